"""What a run writes of itself as JSON, key by key: a round's row, the facts, the summary.

Who makes one, reads it or is handed it has the dictionary that is on disk. A key that is not required is absent where
it does not apply; None stands for what is not known or not told. Files of other versions may lack keys. What metrics
and links of the caller's own give stands beside these keys under their own names, which no type can know: `under`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, NotRequired

from typing_extensions import TypedDict


class TextShares(TypedDict):
    """Of texts, what a model does not see."""

    unknown: float
    """Of the tokens that are taken, those that the tokenizer does not know."""
    rows_cut: float
    tokens_cut: float
    """Of all rows and of all tokens, those beyond `--max-length`."""
    answers_cut: NotRequired[float]
    """Of all rows, those that lose some of what a language model would learn; where there is one."""


class SharesOfClient(TextShares):
    """Of one client's rows."""

    client: int


class TextsSeen(TypedDict):
    """How much of the texts the model sees; where data are hidden, of the test split alone."""

    max_length: int
    left_out: Mapping[str, int]
    """Split -> its rows that have no room for a prompt and an answer, and are no examples."""
    test: TextShares
    train: NotRequired[TextShares]
    worst_client: NotRequired[SharesOfClient]


class Texts(TextsSeen):
    """And that in words."""

    words: str


class AdaptedLayers(TypedDict):
    """Which layers are adapted."""

    words: str
    layers: int
    types: Mapping[str, int]
    """A layer's name without what stands before the number of its block -> how many there are."""
    left_out: Mapping[str, Mapping[str, int]]
    """Why layers are not adapted -> the same of these."""


class Spread(TypedDict):
    """A metric over clients, or over groups of test rows, each of which counts the same."""

    mean: float
    spread: float
    """Their standard deviation."""
    worst_tenth: float
    """The mean over the worst tenth of them."""


class Gain(Spread):
    """What clients gained over the model before the first round, or over another; more is always better."""

    worse: int
    """Clients that lost."""


class ClientScore(TypedDict):
    """A line of client_scores.jsonl: the model that a client has after a round, on the rows that it holds back."""

    round: int
    """0: before the first."""
    client: int
    rows: int
    loss: float
    metric: str
    score: float


class ClientEvaluation(Spread):
    """Every client's own model on rows that it holds back."""

    metric: str
    """The one that `mean`, `spread` and `worst_tenth` are of: accuracy, rmse or perplexity."""
    clients: int
    loss: float
    """Mean, in the unit of `Judged`."""
    gain: NotRequired[Gain]
    """Of the same clients over the model before the first round, in the metric's unit; not there before it."""


class OverGroups(Spread):
    """A metric over the groups of `--score-by`."""

    groups: int
    """In which it is defined."""


class Scored(TypedDict):
    """A group of test rows (`--score-by`): beside these, each metric by its name."""

    rows: int
    standard_errors: Mapping[str, float | None]


class Judged(TypedDict):
    """What a model is judged by beside its loss; metrics of the caller's own and of `--score` stand here too."""

    accuracy: NotRequired[float | None]
    """Share of the test examples; None where nothing was scored."""
    rmse: NotRequired[float | None]
    """Of a regression, in its labels' unit; its losses are mean squared errors, and not nats."""
    pearson: NotRequired[float | None]
    """Of a regression: the correlation of predictions and labels; None where one of them is constant."""
    perplexity: NotRequired[float | None]
    attack_success: NotRequired[float | None]
    """Share of the test rows of other classes that a backdoor's trigger makes the target's; only where there is one."""
    over_clients: NotRequired[Mapping[str, float | None]]
    """Where each client has a model of its own, of each metric M: M_std, the deviation, and M_worst_tenth."""
    client_evaluation: NotRequired[ClientEvaluation]
    """Where clients hold rows back."""
    standard_errors: NotRequired[Mapping[str, float | None]]
    """Of each metric of `--score`; None for a single row."""
    score_by: NotRequired[Mapping[str, Scored]]
    """Value of the column `--score-by` -> what its rows come to."""
    over_groups: NotRequired[Mapping[str, OverGroups]]
    """Metric -> its spread over these; without one that is defined in none."""


class Evaluation(Judged):
    """The model after a round, or before the first."""

    loss: float
    """As tested, in nats; a regression's is its mean squared error."""


class UpdateNorms(TypedDict):
    """Of the updates of a round's clients, each over all its tensors."""

    update_norm_median: float | None
    update_norm_largest: float | None
    clipped: NotRequired[int]
    """How many were over `--max-update-norm`; only with that."""


class Errors(TypedDict):
    """The certificate of a round: relative errors, each None where it is not defined."""

    aggregation_error: float | None
    """How far the published update is from the weighted mean of the clients' updates."""
    transport_error: float | None
    """What the way there took of that mean."""


class OfLinks(TypedDict):
    """What the links of a round add; links of the caller's own add what they like."""

    broadcast_error: NotRequired[float | None]
    """Relative, of what clients were sent to the model; only with a lossy codec down."""


class Arrival(TypedDict):
    """A line of arrivals.jsonl: what became of a message to a client, in virtual seconds since the run began."""

    round: int
    """In which the server knew of it."""
    job: int
    """Its number in the run, from 0."""
    client: int
    trained_on: int
    """The round whose model it brought; 0: the start."""
    asked: float
    ended: float
    """When its update had arrived, or was known to be lost."""
    computing: float
    """Seconds of it in which the client trains."""
    outcome: str
    """used, or why not."""
    staleness: int
    """Server steps in between."""
    weight: float | None
    """Of the update in the mean, before division, times what it counts of a fresh one; None of one that is not used."""
    bytes_down: int
    bytes_up: int
    """On the wire; in vain where it is not used."""


class InVirtualTime(TypedDict, total=False):
    """Of a round; only with `--fleet` or a `--mode`."""

    virtual_seconds: float
    """When it was over, since the run began."""
    used: int
    """Updates that were combined."""
    staleness_mean: float | None
    """Of these, in server steps."""
    bytes_in_vain: int
    """Down and up, of messages that came to nothing, as far as this round was the first to know."""
    under_way: int
    """Messages that nothing is known of yet."""


class FaultCounts(TypedDict):
    """Of a kind of faults on purpose, over a run. What is neither refused nor used came too late, or not yet."""

    put_in: int
    refused: int
    used: int


class OfFaults(TypedDict):
    """Of a round."""

    faults: NotRequired[Mapping[str, int]]
    """Kind -> how many were put in; only with `--fault`."""


class TrainedRow(UpdateNorms, Errors, OfLinks, InVirtualTime, OfFaults):
    """What a round itself tells. Where whole clients are hidden, what tells who came is None."""

    round: int
    """From 1."""
    loss: float | None
    """As tested, in nats; None where the round was not evaluated."""
    clients: int | None
    """That were sent something to train on."""
    failed: int | None
    """Of these."""
    failures: dict[str, str]
    """Client's number -> what went wrong, in a word."""
    train_loss: float | None
    """Of the clients as they train, in the same unit."""
    bytes_up: int | None
    """On the wire, of all clients."""
    bytes_down: int | None
    epsilon: float | None
    """Spent so far; None without a promise, or where none may be claimed."""
    train_seconds: float | None
    evaluate_seconds: float | None


class MetricsRow(TrainedRow, Judged):
    """A round's row of metrics.jsonl. simulated: on the clients' links, by reckoning; only with `--link`."""

    simulated_seconds: NotRequired[float]
    """That all of its messages would take."""
    simulated_seconds_median_client: NotRequired[float]
    simulated_slowest_client: NotRequired[int]
    """Its number."""


class Held(TypedDict):
    """What a client holds."""

    client: str | int
    """Its number, or its name under a natural partition."""
    examples: int
    labels: NotRequired[Mapping[str, int]]
    """Label -> examples, the most frequent first; absent where examples are hidden."""
    groups: NotRequired[Mapping[str, int]]
    """The same of the groups that rows were dealt by; absent where they were not, and where examples are hidden."""


class Attacked(TypedDict):
    """Of hostile clients (`--attack`)."""

    words: str
    clients: Mapping[str, Sequence[int]]
    """What they do, as it was given -> their numbers."""


class Fingerprint(TypedDict):
    """What the data are known by."""

    data_sha256: NotRequired[str]
    """Absent where the run hides them, since it would confirm a guess at them."""


class AdaptedShapes(TypedDict):
    """What bills are reckoned from, as `formulas.Shapes` has it."""

    layers: list[tuple[str, str, int, int, int | None]]
    """Name, type of projection, d_in, d_out and rank of each adapted layer."""
    heads: tuple[int, ...]
    """Numbers in each tensor of the head."""


class Asked(TypedDict):
    """A prompt of samples.json."""

    row: int
    """Of the rows that it is one of, from 1."""
    asked: str
    """What a person asks there: the last turn before the answer, or the beginning of a text."""
    prompt: str
    """All that the model goes on from, special tokens among it."""
    left_out: int
    """Tokens cut out of its middle."""
    reference: str
    """How the data go on."""


class Said(TypedDict):
    """An answer of samples.json."""

    text: str
    ended: bool
    """Whether the model ended it, before it had as many tokens as it may have."""


class SaidAfter(TypedDict):
    """What the model of a round says to each prompt."""

    round: int
    """0: before training."""
    said: list[Said]


class Samples(TypedDict):
    """samples.json: what a language model says to the same prompts as it learns."""

    rows_of: str
    """What the prompts were drawn from, in words."""
    tokens: int
    """That an answer may have."""
    prompts: list[Asked]
    answers: list[SaidAfter]
    """In the order of their rounds."""
    best: int | None
    """The round that was best; None before the end."""
    last: int | None
    notes: list[str]
    """What is not as it should be."""


class FactsOfSome(TypedDict, total=False):
    """What is told of some runs alone."""

    samples: str
    """Which prompts a language model is asked, or why it is asked none."""

    scored_on: str
    """What counts as public of the rows it is tested on; only with privacy."""
    largest_class: float
    """Its share of the test split; only where there are classes."""
    scale: str
    """Where the labels of the test split lie and how far apart, in words; only of a regression."""
    grouped_by: str
    """What rows were dealt by: a column, "length" or "cluster"; absent as `Held.groups` is."""
    groups: Sequence[str]
    """The names of its groups, in their order."""
    privacy: str
    """The promise in a line."""
    attack: Attacked
    """Which clients are hostile; absent where none is."""
    sequences: str
    """Whether they are packed or padded; absent of runs of older versions."""
    public_rows_bytes: int
    """Of the rows of which clients make bases by themselves, where they do."""
    virtual_time: str
    """How rounds go in it, where time is virtual; in words."""
    fleet: str
    """Who is there then, and how fast they are, in words."""
    chain: str
    """The links in their order; in `StartEvent.facts` alone."""


class Facts(Fingerprint, FactsOfSome):
    """facts.json: what the configuration does not say and is known before the first round."""

    versions: dict[str, str]
    """Package -> version, Python and fedlotr among them."""
    parameters: int
    """Of the whole model."""
    trained_adapter: int
    """Numbers."""
    trained_head: int
    """Numbers."""
    train_examples: int | None
    """Of all clients; None where whole clients are hidden."""
    test_examples: int
    task: str
    splits: str
    """What is trained on, what is scored and what was left unread."""
    steps: int | None
    """Optimizer steps of the first client in a round; None where whole clients are hidden."""
    batch_size: int
    labels: Sequence[str]
    """Names, in the order of their numbers; none of a task without."""
    metric: str
    """The decisive one."""
    higher_is_better: bool
    """Of two values of it."""
    losses: dict[str, str]
    """What `loss` and `train_loss` of a row are, in words."""
    texts: Texts
    adapted: AdaptedLayers
    clients_per_round: int
    shapes: AdaptedShapes
    partition: list[Held]
    """A client each, in the order of their numbers; empty where whole clients are hidden."""


class Kinds(NamedTuple):
    """What the examples of clients are told apart by.

    key: of `Held`. names: in their order; none where they are not told apart. by: "label", or what groups them.
    """

    key: Literal["labels", "groups"]
    names: Sequence[str]
    by: str


def kinds_of(facts: Facts) -> Kinds:
    """The groups that rows were dealt by, or else labels; no names where what clients hold of them is not told."""
    by, names = facts.get("grouped_by"), facts.get("labels") or ()
    kinds = Kinds("labels", names, "label") if by is None else Kinds("groups", facts.get("groups") or (), by)
    told = all(kinds.key in held for held in facts.get("partition") or ())
    return kinds if told else kinds._replace(names=())


class Communication(TypedDict):
    """Bytes. Means are over (client, round) pairs in which a client was spoken to; None where it would tell who came.

    Payload is numbers times their width: of the trained tensors, with the parts of the carried term on the way down.
    Wire is all that crosses in that direction each round, control records too, bases apart.
    """

    upload_payload_bytes_per_client_round: float | None
    download_payload_bytes_per_client_round: float | None
    upload_wire_bytes_per_client_round: float | None
    download_wire_bytes_per_client_round: float | None
    one_off_bytes_per_client: float | None
    """Payload of the bases that a client receives, summed over the run."""
    total_payload_bytes: float | None
    total_wire_bytes: float | None


class Codec(TypedDict):
    """How what crossed was coded, and the medians over rounds of what that lost."""

    update: str
    broadcast: str
    error_feedback: bool
    transport_error_median: float | None
    broadcast_error_median: float | None


class Simulated(TypedDict):
    """What the messages of all rounds would take on the clients' links, in seconds; nothing is measured."""

    link: str
    seconds_total: float
    seconds_per_round_median: float
    median_client_seconds_median: float
    slowest_clients: dict[str, int]
    """Client's number -> the rounds in which it was the slowest."""


class VirtualSummary(TypedDict):
    """A run in virtual time; what was lost, and of whom, is told by `failures`."""

    mode: str
    fleet: str
    """In words."""
    seconds_total: float
    seconds_per_round_median: float
    seconds_to_best: float
    """Until the round whose model was best."""
    used: int
    """Updates, of all rounds."""
    staleness_mean: float | None
    bytes_in_vain: int
    under_way: int
    """At the end: messages that nothing has come of."""


class Pace(TypedDict):
    """How long training took; None where whole clients are hidden, since it would tell how many came."""

    seconds_total: float | None
    """From the start, of all starts of a run that was resumed."""
    train_seconds_per_round_median: float | None
    examples_per_second: float | None
    """Trained on, a second of training."""


class Timing(Pace):
    """How long a run took, and what that depends on."""

    evaluate_seconds_per_round_median: float
    base_model_loads: int
    """How often the frozen model was read, by the server and all workers."""
    workers: int
    worker_restarts: int | None
    threads: int | None
    """Of a worker."""
    cohort: int | str
    device: str
    dtype: str
    quantize: str


class NoiseSimulation(TypedDict):
    """Of a run whose noise is that of a larger federation."""

    cohort: float
    population: int
    epsilon: float


class PrivacyInWords(TypedDict):
    """What is said of a promise of privacy beside what it comes to."""

    clip_norm: float | None
    """The bound on what is noised, as it was last."""
    adversary_sees: str
    not_hidden: str
    removal_changes: str
    taken_as_public: str
    scored_on: str
    other_runs: str
    bases_from: str
    public_data: str | None
    init_adapter: str | None
    noise: NotRequired[str]
    simulation: NotRequired[NoiseSimulation]


class Privacy(PrivacyInWords):
    """A promise of privacy and what became of it. Each epsilon is None where none may be claimed."""

    unit: str
    """Example or client: what is hidden."""
    adjacency: str
    epsilon: float | None
    """Of the dearest account."""
    epsilon_reason: str | None
    """Why none is claimed."""
    epsilon_median: float | None
    epsilon_budget: float | None
    delta: float
    accountant: str
    epsilon_by_rdp: float | None
    epsilon_by_opacus_prv: float | None
    noise_multiplier: float
    """Standard deviation, in bounds."""
    sampling: str
    sampling_rate: float
    steps: int


class AllFaults(TypedDict):
    """Of a run."""

    faults: NotRequired[Mapping[str, FaultCounts]]
    """Kind -> what they came to; only with `--fault`."""


class Summary(Fingerprint, AllFaults):
    """summary.json of a finished run."""

    method: str
    strategy: str | None
    baseline: str | None
    model: str
    data: str
    test_split: str
    splits: str
    """As in facts.json."""
    clients: int
    rounds: int
    """That are finished: fewer than configured where the privacy budget was spent."""
    seed: int
    trained_numbers: int
    initial: Evaluation
    """Before the first round."""
    metric: str
    """The decisive one."""
    over_clients: Mapping[str, float | None] | None
    standard_errors: Mapping[str, float | None] | None
    """Of the metrics after the last round, with `--score`."""
    score_by: Mapping[str, Scored] | None
    over_groups: Mapping[str, OverGroups] | None
    losses: dict[str, str]
    """What `loss` and `train_loss` of a row are, in words."""
    texts: Texts
    adapted: AdaptedLayers
    final: dict[str, Any]
    """Metric -> value after the last round; loss among them, in nats."""
    client_evaluation: ClientEvaluation | None
    best: dict[str, Any]
    """round, decisive metric and loss of the round that was best by that metric."""
    adapter_round: int
    """The round whose model the adapter is."""
    failed_clients: int | None
    """Over all rounds; None where whole clients are hidden."""
    failures: dict[str, dict[str, int]]
    """What went wrong -> client -> in how many rounds."""
    communication: Communication
    aggregation_error_max: float | None
    aggregation_error_reason: str | None
    """Why no round has one."""
    codec: Codec | None
    """None where nothing was coded."""
    simulated: Simulated | None
    """None without `--link`, and in virtual time, which knows of links itself."""
    virtual: VirtualSummary | None
    """None where time is not virtual."""
    attack: Attacked | None
    """None where no client is hostile."""
    privacy: Privacy | None
    """None without a promise."""
    warnings: list[str]
    """What the user was told."""
    timing: Timing
    bases_sha256: str
    trained_sha256: str
    versions: dict[str, str]
    checkpoints: list[int]
    """The rounds that a checkpoint is kept of."""


def under(row: Mapping[str, Any], name: str) -> Any:
    """What stands under a name that may be the caller's own; None where nothing does."""
    return row.get(name)
