"""A patch spec against its pairs, its model and its own parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from interv.errors import Problem, nearest
from interv.models import ModelFiles
from interv.models.anatomy import Anatomy
from interv.models.edges import why_no_edges
from interv.plan.checks import check_text_model, check_trained, unread_layers
from interv.plan.circuit import split
from interv.spec import LoadedSpec, PatchSpec
from interv.spec.metrics import NORMALISED, OF_ANSWERS, PLAIN, known_metrics, parse_metric
from interv.task.pairs import Pair


def check_metrics(loaded: LoadedSpec[PatchSpec]) -> Iterator[Problem]:
    """Names of metrics that nobody knows, or that two have."""
    own = tuple(loaded.plugin.metrics) if loaded.plugin else ()
    for name in own:
        if parse_metric(name).is_plain or name in NORMALISED:
            message = f"metric '{name}' of the plug-in has the name of a built-in one"
            yield loaded.problem(("metric",), message, "a function of another name")
    for i, name in enumerate(loaded.spec.metric):
        metric = parse_metric(name)
        if not metric.is_plain and metric.of not in own:
            have = known_metrics(own)
            near = nearest(name, have)
            if metric.normalised:
                of = nearest(metric.of, (*PLAIN, *own))
                near = f"{metric.normalised}:{of}" if of else None
            expected = f"one of: {', '.join(have)}; or one of a --plugin FILE"
            yield loaded.problem(("metric", i), f"metric '{name}' is not known", expected, near)


def check_parts(
    loaded: LoadedSpec[PatchSpec], files: ModelFiles, pairs: Sequence[Pair]
) -> Iterator[Problem]:
    """What the parts of the spec need of the answers, the pairs and the model."""
    spec = loaded.spec
    yield from check_trained(loaded)
    yield from unread_layers(loaded)
    several = next((p for p in pairs if any(len(ids) > 1 for ids in p.all_ids)), None)
    alone = next((p for p in pairs if not p.wrong), None)
    without = next((p for p in pairs if p.corrupted_ids is None), None)
    for i, name in enumerate(spec.metric):
        metric = parse_metric(name)
        if metric.needs_wrong and alone:
            message = f"{name} needs a wrong answer; pair {alone.index} has none"
            yield loaded.problem(("metric", i), message, "wrong: beside each answer")
        if metric.needs_one_token and several:
            expected = "log_probability or log_probability_difference"
            yield _several(loaded, ("metric", i), name, several, expected)
        if metric.normalised == "recovery" and without:
            message = f"{name} needs a corrupted prompt; pair {without.index} has none"
            yield loaded.problem(("metric", i), message, "corrupted: in each pair")
        if not metric.is_plain and several:
            expected = "one of the built-in metrics of probabilities"
            yield _several(
                loaded, ("metric", i), f"{name}, a metric of a plug-in,", several, expected
            )
    early = next((p for p in pairs if not p.ends_text), None)
    if early and several:
        yield _several(loaded, ("data", "at"), "an answer within the prompt", several)
    for part in ("attribution", "decompose", "circuit"):
        if getattr(spec, part) is None:
            continue
        if several:
            yield _several(loaded, (part,), part, several)
        many = next((p for p in pairs if len(p.answer_ids) > 1), None)
        if part == "decompose" and many:
            # The logit of several answers together is no sum of shares.
            message = f"decompose needs one right answer; pair {many.index} has "
            message += f"{len(many.answer_ids)}"
            yield loaded.problem((part,), message, "pairs with one answer")
        metric = parse_metric(spec.metric[0])
        if part != "decompose" and metric.of not in OF_ANSWERS:
            message = f"{part} needs the gradient of the first metric; {spec.metric[0]} has none"
            yield loaded.problem(("metric", 0), message, f"first one of: {', '.join(OF_ANSWERS)}")
    if spec.decompose and spec.decompose.unembedding == "centred" and pairs and not alone:
        message = "decompose.unembedding: centred changes no difference of logits"
        expected = "raw, or pairs without a wrong answer"
        yield loaded.problem(("decompose", "unembedding"), message, expected)
    if spec.circuit and pairs and not all(split(pairs, spec.circuit.held_out, spec.seed)):
        message = f"held_out: {spec.circuit.held_out:g} of the distinct pairs is none or all"
        expected = "more distinct pairs, or another share"
        yield loaded.problem(("circuit", "held_out"), message, expected)
    if spec.circuit and files.facts and files.facts.family:
        anatomy = Anatomy(files.facts.family, files.facts, files.config or {})
        if why := why_no_edges(anatomy):
            message = f"no circuit: {why}"
            yield loaded.problem(("circuit",), message, "attribution or paths, or another model")
    if spec.attribution:
        for i, grid in enumerate(spec.grid):
            named: list[tuple[tuple[str | int, ...], str]] = [
                (("component", j), name) for j, name in enumerate(grid.component or ())
            ]
            named += [
                (("set", j, "component"), site.component) for j, site in enumerate(grid.set or ())
            ]
            for below, component in named:
                if component == "attention_weight":
                    at = ("grid", i, *below)
                    message = "attribution reaches no attention_weight"
                    yield loaded.problem(at, message, "a component that is a module's output")
    yield from check_text_model(loaded, files)
    for i, (layer, head) in enumerate(spec.figures.patterns):
        facts = files.facts
        if facts and not (0 <= layer < facts.n_layers and 0 <= head < facts.n_heads):
            message = f"no head {[layer, head]}: {facts.n_layers} layers of {facts.n_heads} heads"
            yield loaded.problem(("figures", "patterns", i), message, "[layer, head]")


def _several(
    loaded: LoadedSpec[PatchSpec],
    at: tuple[str | int, ...],
    what: str,
    pair: Pair,
    expected: str = "answers that are single tokens",
) -> Problem:
    ids = next(ids for ids in pair.all_ids if len(ids) > 1)
    texts = dict(zip(pair.all_ids, (*pair.answers, *pair.wrong), strict=True))
    message = (
        f"{what} needs answers of one token; {texts[ids]!r} (pair {pair.index}) has {len(ids)}"
    )
    return loaded.problem(at, message, expected)
