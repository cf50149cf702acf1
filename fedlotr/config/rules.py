"""Values of a configuration that are each fine but do not go together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedlotr.adapters.kinds import bases_made_of, cores_that
from fedlotr.adapters.methods import METHODS
from fedlotr.communication.wire_form import read_form

if TYPE_CHECKING:
    from fedlotr.config.configuration import SimulationConfig


NO_CLIENT_STATE = (
    "Flower does not show what its clients keep between rounds, so no checkpoint could hold it; choose ray or local"
)
"""What does not go with Flower's own engine."""


def conflicts(config: SimulationConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """Options that are each fine but do not go together: the fields, and why."""
    method = METHODS[config.method]
    if isinstance(config.sample, int) and config.sample > config.clients:
        yield ("sample", "clients"), "more clients a round than there are"
    if config.local_epochs is not None and config.local_steps is not None:
        yield ("local_epochs", "local_steps"), "a client's work is given in epochs or in steps, not both"
    if config.local_epochs is None and config.local_steps is None:
        yield ("local_epochs", "local_steps"), "one of them must be a number"
    if config.momentum and config.optimizer != "sgd":
        yield ("momentum", "optimizer"), "momentum belongs to the optimizer 'sgd'"
    if config.optimizer_state == "mean-v" and config.optimizer != "adamw":
        yield ("optimizer_state", "optimizer"), "second moments belong to the optimizer 'adamw'; choose reset or keep"
    if config.optimizer_state == "keep" and config.optimizer == "sgd" and not config.momentum:
        yield ("optimizer_state", "momentum"), "sgd without momentum has nothing to keep; give it some, or reset"
    if config.optimizer_state == "keep" and config.engine == "flower":
        yield (
            ("optimizer_state", "engine"),
            NO_CLIENT_STATE,
        )
    if config.workers is not None and config.engine == "local":
        yield ("workers", "engine"), "the engine 'local' works in this process; workers belong to 'ray'"
    if config.device == "cuda" and config.engine == "flower":
        yield ("device", "engine"), "Flower hands out the GPUs of its own engine, and none here; choose ray or local"
    if config.device == "cuda" and config.privacy_engine == "opacus":
        yield ("device", "privacy_engine"), "its noise is drawn on the CPU; choose cohort, or --device cpu"
    if config.workers_per_gpu is not None and config.engine != "ray":
        yield ("workers_per_gpu", "engine"), f"the engine {config.engine!r} starts no workers; they belong to 'ray'"
    elif config.workers_per_gpu is not None and config.device == "cpu":
        yield ("workers_per_gpu", "device"), "the run computes on the CPU; give --device cuda, or leave it out"
    if config.ray_address is not None and config.engine != "ray":
        yield ("ray_address", "engine"), f"the engine {config.engine!r} is not Ray's; choose ray, or leave it out"
    if config.ray_address is not None and "://" in config.ray_address:
        yield (
            ("ray_address",),
            "a run is started on a machine of the cluster: give HOST:PORT, as 'ray start' prints",
        )
    if config.baseline is not None:
        for field in ("strategy", "strategy_arg"):
            if getattr(config, field):
                yield (field, "baseline"), "a baseline averages nothing, so it has no strategy"
        if config.engine == "flower":
            yield ("baseline", "engine"), "a baseline runs on the engines ray and local"
    yield from _codec_conflicts(config)
    yield from _privacy_conflicts(config)
    if config.public_data is not None and config.public_examples == 0:
        yield ("public_data", "public_examples"), "no row of it would be used; give some, or leave it out"
    if config.eval_data is not None and config.eval_split == "held-out":
        yield ("eval_data", "eval_split"), "the latter is a tenth of --data's train; give one of them"
    if config.label_names is not None and config.task == "causal-lm":
        yield ("label_names", "task"), "a language model has no labels"
    if config.resume and config.out is None:
        yield ("resume", "out"), "name the folder of the run to go on with"
    if config.resume_round is not None and not config.resume:
        yield ("resume_round", "resume"), "it says where --resume goes on; give that too"
    if config.on_large_update is not None and config.max_update_norm is None:
        yield ("on_large_update", "max_update_norm"), "no update is too large without a bound; give one"
    if config.max_update_norm is not None and config.baseline is not None:
        yield ("max_update_norm", "baseline"), "a baseline averages nothing, so no client can harm another"
    if config.max_update_norm is not None and config.privacy == "client":
        yield ("max_update_norm", "privacy"), "the server clips every update to --clip-norm; leave it out"
    if method.personal and config.client_eval == 0:
        yield ("client_eval", "method"), "clients with factors of their own can only be scored on rows of their own"
    if method.personal and config.engine == "flower":
        yield (
            ("method", "engine"),
            NO_CLIENT_STATE,
        )
    if config.baseline is not None and (method.personal or config.client_eval):
        decisive = "method" if method.personal else "client_eval"
        yield ("baseline", decisive), "a baseline's clients keep no factors and are tested on the test split alone"
    if method.personal and config.client_rank is not None:
        yield ("client_rank", "method"), "factors that stay with the clients have the run's rank"
    if config.client_adapters and not method.personal:
        yield ("client_adapters", "method"), "no factors stay with the clients: all have the one in adapter/"
    if not method.adapts:
        for field in ("alpha", "basis", "tie", "core", "client_rank"):
            if getattr(config, field) is not None:
                yield (field, "method"), "this method adapts no layer"
        if config.targets != "all-linear":
            yield ("targets", "method"), "this method adapts no layer"
        return
    if not method.factored:
        for field in ("alpha", "basis", "tie", "core", "client_rank"):
            if getattr(config, field) is not None:
                yield (field, "method"), "this method trains whole matrices, without factors"
        return
    basis, basis_name = method.basis_kind(config.basis), config.basis or method.basis
    core, core_name = method.core_kind(config.core), config.core or method.core
    if config.client_rank is not None:
        largest = max(int(part.partition(":")[0]) for part in config.client_rank.split(","))
        if largest != config.rank:
            yield ("client_rank", "rank"), f"the largest must be --rank; give --rank {largest}, or one of {config.rank}"
        if core.trained and not core.nested:
            decisive = "core" if config.core else "method"
            able = " or ".join(map(repr, cores_that(lambda kind: kind.nested)))
            yield (
                ("client_rank", decisive),
                f"the core {core_name!r} has no leading block; choose {able}",
            )
    if config.tie not in (None, "layer") and not (method.has_core and method.freezes):
        yield ("tie", "method"), "this method trains B and A in every layer, so no layers can share them"
    of_gradient = basis.made_of == "gradient"
    if of_gradient and config.privacy != "none" and config.public_data is None:
        if config.basis is not None:  # else it gives way to one from W
            yield (
                ("basis", "privacy"),
                "it is made of a gradient, and rows withheld from private data are private: give --public-data, or a "
                f"basis from a seed ({bases_made_of('seed')[0]}) or from W ({bases_made_of('weights')[0]})",
            )
    elif of_gradient and config.public_examples == 0:
        decisive = "basis" if config.basis else "method"
        yield (
            ("public_examples", decisive),
            f"the basis {basis_name!r} takes its gradient from public examples; give some",
        )
    if core.constant is not None and not method.freezes:
        yield (
            ("core", "method"),
            f"the matrices of {core_name!r} belong to frozen factors, and this method trains B and A",
        )
    if basis.zero_b and method.has_core and "B" in method.train:
        yield ("basis", "method"), "this basis starts with B at zero, as does the method's core: nothing would learn"
    if basis.zero_b and "B" not in method.train:
        yield ("basis", "method"), "this basis starts with B at zero and the method never moves B: nothing would learn"


def _codec_conflicts(config: SimulationConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    update, broadcast = read_form(config.codec), read_form(config.broadcast_codec)
    if config.baseline is not None:
        for field, form in (("codec", update), ("broadcast_codec", broadcast)):
            if form.coded:
                yield (field, "baseline"), "a baseline sends nothing"
    if config.baseline is not None and config.link is not None:
        yield ("link", "baseline"), "a baseline sends nothing"
    if config.error_feedback and not update.lossy:
        yield ("error_feedback", "codec"), "this codec loses nothing that a client could make up for"
    if config.client_rank is not None and broadcast.coded:
        yield (
            ("broadcast_codec", "client_rank"),
            "a client knows the shapes of the run's tensors, and not those of its blocks; only --codec goes with ranks",
        )
    if config.engine == "flower":
        if config.error_feedback:
            yield ("error_feedback", "engine"), NO_CLIENT_STATE
        if broadcast.delta:
            yield ("broadcast_codec", "engine"), NO_CLIENT_STATE


def _privacy_conflicts(config: SimulationConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    if config.privacy == "client" and read_form(config.codec).zstd:
        yield ("codec", "privacy"), "the size of a squeezed update tells of what is in it; leave +zstd out"
    if config.privacy_engine == "opacus":
        if config.privacy != "example":
            yield ("privacy_engine", "privacy"), "it belongs to --privacy example"
        method = METHODS[config.method]
        if not (method.factored and method.core_kind(config.core).plain):
            able = " or ".join(cores_that(lambda kind: kind.plain))
            yield (
                ("privacy_engine", "method"),
                f"Opacus' hooks are for plain matrices: a method with the core {able}, such as fed-sb or lora",
            )
        if config.optimizer_state != "reset":
            yield ("privacy_engine", "optimizer_state"), "its optimizer begins anew in every round"
        if config.client_rank is not None:
            yield ("privacy_engine", "client_rank"), "it knows one rank"
        if config.gradient_checkpointing:
            yield ("privacy_engine", "gradient_checkpointing"), "its hooks would see every block run twice"
    if config.privacy == "none":
        for field in ("epsilon", "noise_multiplier", "delta", "clip_quantile", "noise_cohort", "reproducible_noise"):
            if getattr(config, field):
                yield (field, "privacy"), "there is no noise without --privacy example or --privacy client"
        if config.public_eval:
            yield ("public_eval", "privacy"), "it belongs to --privacy: nothing is hidden without"
        return
    if config.eval_data is not None and not config.public_eval:
        yield (
            ("eval_data", "privacy"),
            "its rows are scored without noise: where they are nobody's secret, say so by --public-eval",
        )
    method = METHODS[config.method]
    if config.epsilon is None and config.noise_multiplier is None:
        yield ("privacy",), "how private is to be said: give --epsilon (8, or 1), or --noise-multiplier"
    if config.epsilon is not None and config.noise_multiplier is not None:
        yield ("epsilon", "noise_multiplier"), "each follows from the other; give one of them"
    if method.personal:
        yield (
            ("method", "privacy"),
            "clients with factors of their own are scored on rows of their own, which no noise would cover; choose a "
            "method without such factors",
        )
    elif config.client_eval:
        yield ("client_eval", "privacy"), "a score on a client's own rows tells of them, and no noise would cover it"
    if config.privacy == "example":
        for field in ("clip_quantile", "noise_cohort"):
            if getattr(config, field) is not None:
                yield (field, "privacy"), "it belongs to --privacy client"
        return
    if config.clip_norm is None:
        yield (
            ("privacy",),
            "it needs --clip-norm, the largest norm of what one client's training changes; with --clip-quantile 0.5 "
            "that finds its size by itself, from wherever it starts",
        )
    if config.weights == "examples":
        yield ("weights", "privacy"), "clients that weigh differently are not hidden equally; leave it out, or uniform"
    if config.link is not None:
        yield ("link", "privacy"), "how long a round's messages take would tell who took part; leave it out"
    if config.optimizer_state == "mean-v":
        yield ("optimizer_state", "privacy"), "the means of second moments would travel without noise; choose reset"
    if config.client_rank is not None:
        yield ("client_rank", "privacy"), "which ranks take part would be seen; leave it out"
    if config.baseline is not None:
        yield ("baseline", "privacy"), "a baseline has no server that could hide clients; choose --privacy example"
