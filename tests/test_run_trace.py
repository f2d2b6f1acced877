"""`interv trace` from the command to the CSV, against tracing by plain hooks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers

from tests import zoo
from tests.by_hand import draws, module_name, trace_cell
from tests.conftest import CORPUS, PROMPT, Result, SpecWriter

FACT = {"prompt": PROMPT, "subject": "The Space Needle", "answer": "Seattle"}
Cli = Callable[..., Result]


def run(cli: Cli, path: Path, tmp_path: Path, *arguments: str) -> Path:
    result = cli("trace", path, *arguments, "-o", tmp_path / "outputs")
    assert result.code == 0, result.err
    return Path(result.out.strip())


def results(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "results.csv", keep_default_na=False)


def load(folder: Path) -> torch.nn.Module:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return model.eval()


def token_ids(folder: Path, text: str) -> list[int]:
    return transformers.AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)[
        "input_ids"
    ]


def known_fact(folder: Path) -> tuple[str, str]:
    """A prompt, and the model's top answer to it, that is text."""
    model, tokenizer = load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for prompt in (f"{a} {b} is" for a in CORPUS[3].split() for b in CORPUS[0].split()):
        ids = token_ids(folder, prompt)
        with torch.no_grad():
            top = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        text = tokenizer.decode([top])
        if token_ids(folder, prompt + text) == [*ids, top]:
            return prompt, text
    raise AssertionError("no prompt with a printable answer")


GRID = [
    {"component": "block_output"},
    {"component": ["mlp_output", "attention_output"], "window": 2},
    {"component": "block_output", "sever": "mlp_output"},
    {"component": "block_output", "sever": "attention_output", "positions": "last_subject"},
]


@pytest.mark.parametrize("metric", ["probability", "log_probability", "logit", "rank"])
def test_every_cell_is_what_plain_hooks_give(
    write_spec: SpecWriter, model_folder: Path, cli: Cli, tmp_path: Path, metric: str
) -> None:
    level, samples, seed = 0.7, 3, 5
    path = write_spec(
        model={"path": str(model_folder), "dtype": "float64"},
        corrupt={"type": "noise", "level": level, "samples": samples, "draw_seed": seed},
        grid=GRID,
        metric=metric,
    )
    table = results(run(cli, path, tmp_path))
    model = load(model_folder)
    ids = token_ids(model_folder, PROMPT)
    [answer] = token_ids(model_folder, " Seattle")
    n_layers, width, subject = 3, 24, (0, 3)
    noise = draws(seed, samples, 3, width, level)
    assert len(table) == 3 * 6 * 4 + 3

    def read(logits: torch.Tensor) -> float:
        last = logits[:, -1]
        chosen = {
            "probability": last.softmax(-1)[:, answer],
            "log_probability": last.log_softmax(-1)[:, answer],
            "logit": last[:, answer],
            "rank": (last > last[:, [answer]]).sum(-1).double(),
        }[metric]
        return float(chosen.mean())

    with torch.no_grad():
        clean = read(model(torch.tensor([ids])).logits)
    corrupted = read(trace_cell(model, ids, subject, noise, []))
    moved = 0
    for row in table.to_dict("records"):
        window = range(
            max(0, row["layer"] - row["window"] // 2),
            min(n_layers, row["layer"] - (-row["window"] // 2)),
        )
        restore = [(row["pos"], module_name(model, row["component"], i)) for i in window]
        hold = [
            (row["pos"], module_name(model, row["severed"], i))
            for i in range(n_layers)
            if row["severed"]
        ]
        expected = read(trace_cell(model, ids, subject, noise, restore, hold))
        assert row["value"] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert row["clean"] == pytest.approx(clean, rel=1e-9)
        assert row["corrupted"] == pytest.approx(corrupted, rel=1e-9)
        assert row["effect"] == pytest.approx(expected - corrupted, rel=1e-6, abs=1e-12)
        moved += abs(row["effect"]) > 1e-6 * abs(clean)
    assert moved > len(table) / 4, "hardly any restoration had an effect"


def test_another_prompt_as_corruption(
    write_spec: SpecWriter, model_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    path = write_spec(
        model={"path": str(model_folder), "dtype": "float64"},
        data={"facts": [{**FACT, "corrupted_subject": "The Old Bridge"}], "keep": "all"},
        corrupt={"type": "prompt"},
        grid={"component": "block_output"},
    )
    table = results(run(cli, path, tmp_path))
    model = load(model_folder)
    ids = token_ids(model_folder, PROMPT)
    other = token_ids(model_folder, PROMPT.replace("Space Needle", "Old Bridge"))
    [answer] = token_ids(model_folder, " Seattle")
    assert set(table["draws"]) == {1}
    for row in table.to_dict("records"):
        name = module_name(model, "block_output", row["layer"])
        logits = trace_cell(model, ids, (0, 3), None, [(row["pos"], name)], corrupted_ids=other)
        assert row["value"] == pytest.approx(float(logits[0, -1].softmax(-1)[answer]), rel=1e-9)
    last = table[(table["pos"] == 5) & (table["layer"] == 2)].iloc[0]
    assert last["value"] == pytest.approx(last["clean"], rel=1e-9)


def test_an_answer_of_several_tokens_is_scored_whole(
    write_spec: SpecWriter, gpt2_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    path = write_spec(
        model={"path": str(gpt2_folder), "dtype": "float64"},
        data={"facts": [{**FACT, "answer": "Seattle Rome Paris"}], "keep": "all"},
        corrupt={"type": "noise", "level": 0.5, "samples": 2, "draw_seed": 3},
        grid={"component": "block_output"},
    )
    table = results(run(cli, path, tmp_path))
    model = load(gpt2_folder)
    ids = token_ids(gpt2_folder, PROMPT)
    answer = token_ids(gpt2_folder, " Seattle Rome Paris")
    assert len(answer) == 3
    assert set(table["pos"]) == set(range(len(ids)))
    noise = draws(3, 2, 3, 24, 0.5)
    for row in table.to_dict("records"):
        name = module_name(model, "block_output", row["layer"])
        logits = trace_cell(model, ids + answer[:-1], (0, 3), noise, [(row["pos"], name)])
        steps = logits.softmax(-1)[:, len(ids) - 1 :]
        product = steps[:, 0, answer[0]] * steps[:, 1, answer[1]] * steps[:, 2, answer[2]]
        assert row["value"] == pytest.approx(float(product.mean()), rel=1e-9)


def test_sigma_is_the_authors_scalar(
    write_spec: SpecWriter, gpt2_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    facts = [FACT, {"prompt": "in downtown Rome", "subject": "Rome", "answer": "Paris"}]
    path = write_spec(
        data={"facts": facts, "keep": "all"}, corrupt={"type": "noise", "level": "2.5s"}
    )
    folder = run(cli, path, tmp_path, "grid.layers=0", "grid.positions=last")
    record = json.loads((folder / "run.json").read_text())
    weight = load(gpt2_folder).transformer.wte.weight.detach()
    # collect_embedding_std: each subject tokenised by itself, one standard deviation over all.
    tokens = token_ids(gpt2_folder, "The Space Needle") + token_ids(gpt2_folder, "Rome")
    assert record["sigma"] == pytest.approx(float(weight[tokens].std()), rel=1e-6)
    assert record["noise_level"] == pytest.approx(2.5 * record["sigma"])
    whole = run(cli, path, tmp_path, "corrupt.sigma_over=vocabulary", "grid.layers=0")
    record = json.loads((whole / "run.json").read_text())
    assert record["sigma"] == pytest.approx(float(weight.std()), rel=1e-6)


def test_a_corruption_that_hardly_corrupts_is_said_everywhere(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path
) -> None:
    path = write_spec(grid={"component": "block_output", "layers": 0}, figures={"formats": ["png"]})
    weak = cli("trace", path, "corrupt.level=0.01", "--json", "-o", tmp_path / "outputs")
    assert weak.code == 0, weak.err
    printed = json.loads(weak.out)
    folder = Path(printed["folder"])
    [prompt] = pd.read_csv(folder / "prompts.csv").to_dict("records")
    clean, corrupted = prompt["p_clean"], prompt["p_corrupted"]
    assert abs(corrupted - clean) < 0.1 * clean
    assert printed["corruption"] == json.loads((folder / "run.json").read_text())["corruption"]
    assert printed["corruption"] == {
        "p_clean": pytest.approx(clean),
        "p_corrupted": pytest.approx(corrupted),
        "share_taken": pytest.approx(1 - corrupted / clean),
        "weak": True,
        "weak_prompts": 1,
    }
    assert "WARNING: The corruption hardly corrupts" in weak.err
    assert cli("report", folder).code == 0
    assert "The corruption hardly corrupts" in (folder / "report.html").read_text("utf-8")
    strong = cli("trace", path, "corrupt.level=1.0", "-o", tmp_path / "outputs")
    [prompt] = pd.read_csv(Path(strong.out.strip()) / "prompts.csv").to_dict("records")
    assert prompt["p_corrupted"] < 0.9 * prompt["p_clean"]
    assert "WARNING" not in strong.err
    assert cli("report", strong.out.strip()).code == 0
    assert "corrupts" not in (Path(strong.out.strip()) / "report.html").read_text("utf-8")


def test_facts_that_the_model_does_not_know_are_left_out_with_the_reason(
    write_spec: SpecWriter, gpt2_folder: Path, cli: Cli, tmp_path: Path
) -> None:
    prompt, top = known_fact(gpt2_folder)
    fact = {"prompt": prompt, "subject": prompt.split()[0]}
    facts = [{**fact, "answer": "Mostar"}, {**fact, "answer": top}]
    path = write_spec(data={"facts": facts, "keep": "correct", "join": ""})
    outcome = cli("trace", path, "-o", tmp_path / "outputs")
    assert outcome.code == 0, outcome.err
    assert "1 of 2 prompts left out" in outcome.err
    folder = Path(outcome.out.strip())
    prompts = pd.read_csv(folder / "prompts.csv", keep_default_na=False)
    assert list(prompts["traced"]) == [False, True]
    assert repr(top) in prompts["left_out_because"][0]
    assert set(results(folder)["prompt_id"]) == {1}


def test_no_prompt_left_is_an_error_that_says_what_the_model_answers(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path
) -> None:
    path = write_spec(data={"facts": [{**FACT, "answer": "Mostar"}]})
    for _ in range(2):
        result = cli("trace", path, "-o", tmp_path / "outputs")
        assert result.code == 1
        assert "no prompt is left" in result.err
        assert "data.keep=all" in result.err


def test_values_do_not_depend_on_other_prompts_or_pack_sizes(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path, gpt2_folder: Path
) -> None:
    facts = [FACT, {"prompt": "The Old Bridge is in downtown", "subject": "Old", "answer": "Rome"}]
    options = {"model": {"path": str(gpt2_folder), "dtype": "float64"}}
    tables = [
        results(run(cli, write_spec(data={"facts": f, "keep": "all"}, **options), tmp_path, *more))
        for f, more in (
            (facts, ()),
            (facts[::-1], ("run.max_tokens=1", "name=b")),
            (facts[:1], ("run.max_tokens=9999", "name=c")),
        )
    ]
    first = tables[0][tables[0]["prompt_id"] == 0]["value"].to_numpy()
    assert tables[1][tables[1]["prompt_id"] == 1]["value"].to_numpy() == pytest.approx(
        first, rel=1e-9
    )
    assert tables[2]["value"].to_numpy() == pytest.approx(first, rel=1e-9)


def test_what_is_kept_of_a_prompt_is_gone_with_it(write_spec: SpecWriter) -> None:
    """Else the memory of a run would grow with its prompts."""
    from interv.engine import SuffixExecutor, load_model
    from interv.plan import make_plan
    from interv.runner.sweep import Step
    from interv.runner.trace import Tracer
    from interv.spec import load_spec

    facts = [FACT, {"prompt": "The Old Bridge is in downtown", "subject": "Old", "answer": "Rome"}]
    plan = make_plan(load_spec(write_spec(data={"facts": facts, "keep": "all"})))
    model = load_model(plan.files, plan.spec.model, 0, "cpu")
    tracer = Tracer(plan, model)
    tracer.executor = executor = SuffixExecutor(model.module, model.anatomy, 3)
    for index, key in plan.baselines.items():
        tracer.do(Step("", (key,), "baseline", index))
        assert len(executor._bases) == 1 + plan.draws


def test_several_metrics_cost_one_run(write_spec: SpecWriter, cli: Cli, tmp_path: Path) -> None:
    path = write_spec(metric=["probability", "logit", "rank"])
    folder = run(cli, path, tmp_path)
    assert list(results(folder)["metric"].unique()) == ["probability", "logit", "rank"]
    again = cli("trace", path, "metric=log_probability", "-o", tmp_path / "outputs")
    assert again.code == 0
    assert "taken over from earlier runs" in again.err


def test_a_larger_grid_takes_over_what_a_smaller_one_computed(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path
) -> None:
    path = write_spec(grid={"component": "block_output"})
    small = run(cli, path, tmp_path, "grid.layers=0-1")
    result = cli("trace", path, "-o", tmp_path / "outputs")
    large = Path(result.out.strip())
    assert large != small
    record = json.loads((large / "run.json").read_text())
    assert record["points_from_other_runs"] == 12 + 1
    both = results(large).merge(results(small), on=["component", "layer", "pos"])
    assert len(both) == 12
    assert (both["value_x"] == both["value_y"]).all()


def test_the_record_says_what_is_needed_to_run_it_again(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path
) -> None:
    path = write_spec()
    folder = run(cli, path, tmp_path, "seed=7")
    assert (folder / "spec.yaml").read_text() == path.read_text()
    record = json.loads((folder / "run.json").read_text())
    assert record["seed"] == 7
    assert record["environment"]["torch"] == torch.__version__
    assert record["model"]["special_tokens"] == [[], []]
    assert record["environment"]["executor"] == "suffix"
    certificate = record["sessions"][0]["certificate"]
    assert certificate["difference"] <= certificate["allowed"]
    assert record["sessions"][0]["packages"]["torch"]
    copy = tmp_path / "copy.yaml"
    copy.write_text((folder / "resolved.yaml").read_text())
    again = run(cli, copy, tmp_path / "elsewhere")
    assert again.name == folder.name
    assert (again / "results.csv").read_bytes() == (folder / "results.csv").read_bytes()


def test_resuming_under_other_versions_is_refused_with_the_reason(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path
) -> None:
    path = write_spec(run={"max_tokens": 20})
    folder = run(cli, path, tmp_path)
    journal = folder / "journal.jsonl"
    lines = journal.read_text().splitlines()
    head = json.loads(lines[0])
    head["environment"]["torch"] = "1.0"
    journal.write_text("\n".join([json.dumps(head), *lines[1:4]]) + "\n")
    result = cli("trace", path, "-o", tmp_path / "outputs")
    assert result.code == 1
    assert f"torch 1.0 -> {torch.__version__}" in result.err
    assert "--fresh" in result.err
    fresh = cli("trace", path, "-o", tmp_path / "outputs", "--fresh")
    assert fresh.code == 0
    assert (folder.parent / f"{folder.name}-old-1" / "journal.jsonl").is_file()
    assert len(results(folder)) == 36


def test_a_finished_run_is_not_computed_again(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path
) -> None:
    path = write_spec()
    folder = run(cli, path, tmp_path)
    before = {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    (folder / "results.csv").unlink()
    again = cli("trace", path, "-o", tmp_path / "outputs")
    assert "nothing was left to compute" in again.err
    assert {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_fresh_computes_everything_again(write_spec: SpecWriter, cli: Cli, tmp_path: Path) -> None:
    path = write_spec()
    folder = run(cli, path, tmp_path)
    again = run(cli, path, tmp_path, "--fresh")
    assert again == folder
    assert json.loads((folder / "run.json").read_text())["points_from_other_runs"] == 0
    larger = run(cli, path, tmp_path, "metric=logit", "--fresh")
    assert json.loads((larger / "run.json").read_text())["points_from_other_runs"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_numbers(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path, gpt2_folder: Path, dtype: str
) -> None:
    metric = {"metric": "log_probability"}
    wide = results(run(cli, write_spec(**metric), tmp_path))
    path = write_spec(model={"path": str(gpt2_folder), "dtype": dtype}, **metric)
    narrow = results(run(cli, path, tmp_path))
    spread = wide["value"].max() - wide["value"].min()
    difference = (wide["value"] - narrow["value"]).abs().max()
    assert 0 < difference < 0.1 * spread


def test_eager_attention_agrees(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path, gpt2_folder: Path
) -> None:
    model = {"path": str(gpt2_folder), "dtype": "float64"}
    sdpa = results(run(cli, write_spec(model=model), tmp_path))
    eager = results(run(cli, write_spec(model={**model, "attn_implementation": "eager"}), tmp_path))
    assert eager["value"].to_numpy() == pytest.approx(sdpa["value"].to_numpy(), rel=1e-9)


def test_a_random_model_from_a_config(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path, gpt2_folder: Path
) -> None:
    from tests.conftest import tiny_config

    model = {"config": tiny_config("llama"), "tokenizer": str(gpt2_folder)}
    first = results(run(cli, write_spec(model=model), tmp_path))
    second = results(run(cli, write_spec(model=model, seed=1), tmp_path))
    assert (first["clean"] != second["clean"]).all()


def test_a_chat_template_is_applied_and_recorded(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path, gpt2_folder: Path
) -> None:
    import shutil

    folder = tmp_path / "chatty"
    shutil.copytree(gpt2_folder, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ bos_token }}{{ m.content }} in{% endfor %}"
    )
    path = write_spec(
        model={"path": str(folder), "chat_template": True}, grid={"component": "mlp_input"}
    )
    out = run(cli, path, tmp_path)
    prompts = pd.read_csv(out / "prompts.csv", keep_default_na=False)
    assert prompts["prompt"][0] == f"<s>{PROMPT} in"
    assert prompts["answer"][0] == "Seattle"
    assert prompts["subject_first"][0] == 1
    assert json.loads((out / "run.json").read_text())["model"]["chat_template"] is True


@pytest.mark.parametrize("kind", ["stablelm", "mistral", "gemma2", "gpt_neo", "bert"])
def test_other_families_give_the_same_table_on_both_executors(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path, gpt2_folder: Path, kind: str
) -> None:
    """A type that is recognised, windows that slide (of 3 tokens), models
    whose rows start at layers only."""
    config = {**zoo.CONFIGS[kind], "vocab_size": 420, "initializer_range": 0.3}
    grid = [
        {"component": ["block_output", "mlp_input", "mlp_activation", "attention_input"]},
        {"component": ["mlp_output", "attention_output"], "window": 2},
        {"component": "block_output", "sever": "attention_output"},
    ]
    tokenizer, text = gpt2_folder, PROMPT
    if kind in zoo.ENCODERS:
        # It predicts at a mask, for which one token is taken here.
        tokenizer, text = tmp_path / "masks", f"{PROMPT}<s>"
        tokenizer.mkdir()
        (tokenizer / "tokenizer.json").write_text((gpt2_folder / "tokenizer.json").read_text())
        (tokenizer / "tokenizer_config.json").write_text(json.dumps({"mask_token": "<s>"}))
    fact = {"prompt": text, "subject": "The Space Needle", "answer": "Seattle"}
    path = write_spec(
        model={"config": config, "tokenizer": str(tokenizer), "dtype": "float64"},
        data={"facts": [fact], "keep": "all"},
        grid=grid,
        metric="log_probability",
    )
    tables = {}
    for executor in ("suffix", "reference"):
        folder = run(cli, path, tmp_path / executor, f"run.executor={executor}")
        tables[executor] = results(folder)
        record = json.loads((folder / "run.json").read_text())
        assert record["environment"]["executor"] == executor
    pd.testing.assert_frame_equal(tables["suffix"], tables["reference"], rtol=1e-6, atol=1e-6)
    assert len(tables["suffix"]) == 3 * (7 if kind in zoo.ENCODERS else 6) * 7
    assert (tables["suffix"]["effect"].abs() > 1e-3).mean() > 0.4, "hardly anything had an effect"


def test_a_component_that_a_recognised_model_lacks_is_an_error(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path, gpt2_folder: Path
) -> None:
    config = {**zoo.CONFIGS["cohere"], "vocab_size": 420}
    model = {"config": config, "tokenizer": str(gpt2_folder)}
    path = write_spec(model=model, grid={"component": "resid_mid"})
    assert "components: models of type 'cohere' are recognised" in cli("plan", path).out
    result = cli("trace", path, "-o", tmp_path / "outputs")
    assert result.code == 1
    assert "cohere models have no component 'resid_mid'" in result.err
    assert "Traceback" not in result.err


def test_a_resumed_run_keeps_the_size_of_its_packs(
    write_spec: SpecWriter, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What memory was free when it began decides them, whatever is free later."""
    from interv.plan import make_plan
    from interv.plan.cost import token_bytes
    from interv.spec import load_spec

    path = write_spec()
    facts = make_plan(load_spec(path)).facts
    assert facts is not None

    def free(tokens: int) -> None:
        monkeypatch.setattr(
            "interv.plan.cost.free_cpu_bytes", lambda: 8 * tokens * token_bytes(facts, "float32")
        )

    free(16)
    folder = run(cli, path, tmp_path)
    journal = folder / "journal.jsonl"
    whole, table = journal.read_text(), (folder / "results.csv").read_bytes()
    lines = whole.splitlines(keepends=True)
    assert json.loads(lines[0])["environment"]["max_tokens"] == 16
    assert len(lines) > 10
    journal.write_text("".join(lines[:5]))
    free(1000)
    assert run(cli, path, tmp_path) == folder
    assert journal.read_text() == whole
    assert (folder / "results.csv").read_bytes() == table
    # A number of the spec's own is another condition, as it always was.
    journal.write_text("".join(lines[:5]))
    other = cli("trace", path, "run.max_tokens=30", "-o", tmp_path / "outputs")
    assert other.code == 1
    assert "max_tokens 16 -> 30" in other.err
