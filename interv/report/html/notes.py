"""What a reader of a run should be warned of."""

from __future__ import annotations

from collections import Counter

from interv.report.certificate import holds, in_words
from interv.report.corruption import corruption
from interv.report.html.folder import RunFolder, number
from interv.report.html.prompts import left_out


def warnings(run: RunFolder) -> list[str]:
    """Each a sentence, the gravest first."""
    found = [
        *_corruption(run),
        *_claims(run),
        *_executor(run),
        *_prompts(run),
        *_intervals(run),
        *_circumstances(run),
    ]
    return list(dict.fromkeys(found))


def _corruption(run: RunFolder) -> list[str]:
    traced = [row for row in run.table("prompts.csv") if row.get("traced") == "True"]
    if run.kind != "trace" or not traced:
        return []
    warning = corruption((number(r["p_clean"]), number(r["p_corrupted"])) for r in traced).warning
    return [warning] if warning else []


def _claims(run: RunFolder) -> list[str]:
    counts = Counter(row["verdict"] for row in run.table("reference.csv"))
    total = sum(counts.values())
    words = {
        "missed": "were missed",
        "noted": "were missed, which is only noted, for the reason given there",
        "outside": "lie outside the grid that was run",
    }
    return [
        f"{counts[verdict]} of {total} claims of the reference {told}."
        if counts[verdict] > 1
        else f"1 of {total} claims of the reference {_singular(told)}."
        for verdict, told in words.items()
        if counts[verdict]
    ]


def _singular(words: str) -> str:
    return words.replace("were", "was", 1).replace("lie", "lies", 1)


def _executor(run: RunFolder) -> list[str]:
    found = []
    for session in run.sessions:
        certificate = session.get("certificate")
        if certificate and not holds(certificate):
            found.append(
                f"The fast executor is not certified ({in_words(certificate)}): the reference "
                "executor computed this run."
            )
    wanted = (run.resolved.get("run") or {}).get("executor")
    used = run.record["environment"]["executor"]
    if run.kind != "collect" and wanted == "suffix" and used == "reference" and not found:
        found.append("The suffix executor was asked for; the reference executor computed.")
    return found


def _prompts(run: RunFolder) -> list[str]:
    found = []
    reasons = left_out(run)
    if reasons:
        gone = sum(count for _, count in reasons)
        why = "; ".join(f"{count:,}: {reason}" for reason, count in reasons[:4])
        found.append(f"{gone:,} of {run.record['prompts']:,} prompts are left out ({why}).")
    elif run.kind == "train-das":
        some = [
            (row["split"], int(row["pairs"]) - int(row["pairs_used"]))
            for row in run.table("prompts.csv")
            if "pairs_used" in row
        ]
        if splits := ", ".join(f"{count:,} of {split}" for split, count in some if count):
            found.append(f"Pairs that the model gets wrong are left out: {splits}.")
    return found


def _intervals(run: RunFolder) -> list[str]:
    rows = run.table("summary.csv")
    none = [row for row in rows if "ci_low" in row and row["ci_low"] in ("", "nan")]
    if not none:
        return []
    reasons = Counter(row.get("no_interval") or "not said" for row in none)
    why = "; ".join(f"{count:,}: {reason}" for reason, count in reasons.most_common(3))
    which = "No row has an interval"
    if len(none) < len(rows):
        which = f"{len(none):,} of {len(rows):,} rows have no interval"
    return [f"{which} ({why})."]


def _circumstances(run: RunFolder) -> list[str]:
    found = [f"{note[:1].upper()}{note[1:]}." for note in run.record.get("notes", ())]
    if any((session.get("git") or {}).get("dirty") for session in run.sessions):
        found.append("The working folder had changes that were not committed to git.")
    versions = {run.record["interv"], run.record["environment"]["interv"]}
    if len(versions) > 1:
        found.append(f"Versions {' and '.join(sorted(versions))} of interv took part.")
    if taken := run.record.get("points_from_other_runs"):
        found.append(f"{taken:,} values were taken over from other runs of the same name.")
    if plugin := run.record.get("plugin"):
        found.append(
            f"It ran code of the user's own: {', '.join(plugin['files'])} (sha256 "
            f"{plugin['sha256'][:16]}…)."
        )
    if run.kind in ("trace", "patch", "train-das") and _has_no_tokens(run):
        found.append(
            "prompts.csv is of a version that kept no tokens: the same command again writes them."
        )
    return found


def _has_no_tokens(run: RunFolder) -> bool:
    rows = run.table("prompts.csv")
    return bool(rows) and "prompt_id" in rows[0] and "tokens" not in rows[0]
