"""The study: what makes the difference?

    python toy_world.py --study    # about an hour on two cores; a killed study continues

A world for every seed: all arms start from one base and are judged on one set of masks; policies
are judged on masks of other kinds as well; D_vis is probed; robustness is tested after SFT; base
and MMRPT are tuned on questions. And for every other bias a world with a few arms (BIAS_ARMS).

What OUT/study.json holds, every number as {values (one per seed), mean, std}:

    arms, bias          by arm (ARMS), and by bias and arm: the metrics of toy_world.py, and
                        reliance_*, those less the ones with another record's image. clip is no
                        policy but the teacher: the colours that it chooses for objects not painted
                        in their stereotype colour
    masks               the metrics of arms by what a policy was trained on, and by the kind of
                        masks that it is judged on
    prior_reliance      its rank correlation with the stereotype rate, over all arms of a world and
                        over the able ones: those with half of the base's exact matches or more
    questions           scores on val.tsv of base and MMRPT, after a short tuning on questions
    dependency, rules   what the scores of stage 1 find, and what the masks of each rule hit
    probe               by model: layers (D_vis of each alone), and patches (metrics with 1, 2 or 4
                        of 16 patches hidden: those that the sentence of the mask attends to most
                        or least, any, or any of other objects)
    robustness          by order of training, corruption and strength. text: without and with a
                        false sentence, which gives the hidden object its stereotype colour, in
                        place of a sentence about another object
    jobs, failed        the command of every job; what failed, and why
"""

import collections
import itertools
import json

from common.locks import lock_output
from common.records import check_settings, fail, load_records, write_json
from common.stats import mean_std, spearman
from toy.commands import run_jobs
from toy.metrics import dependency_metrics, prediction_metrics, prior_reliance, rule_metrics
from toy.study_jobs import ARMS, BIAS_ARMS, FEW, MASK_KINDS, SIZES, study_jobs
from toy.study_page import print_means, write_study_page
from toy.world import load_truth

# arms of any world
JUDGED = tuple(dict.fromkeys(itertools.chain(("base",), ARMS, *BIAS_ARMS.values())))


def aggregate(results):
    """Nested dicts of numbers, one per seed, as one nested dict of mean_std().

    A seed whose job failed is None, or lacks a part: [{"a": 1.0}, None] gives
    {"a": {"values": [1.0, None], "mean": 1.0, "std": None}}.
    """
    keys = {}
    for result in results:
        if isinstance(result, dict):
            keys |= dict.fromkeys(result)
    if not keys:
        return mean_std([None if result == {} else result for result in results])

    parts = {}
    for key in keys:
        parts[key] = aggregate([(result or {}).get(key) for result in results])
    return parts


def arm_metrics(folder, truth):
    """{metrics, reliance_*} of the predictions in an evaluation's folder; {} if there are none."""
    path = folder / "predictions.jsonl"
    if not path.exists():
        return {}
    predictions = load_records(path)
    metrics = {}
    for condition in ("real", "shuffled"):
        shown = [p for p in predictions if p["condition"] == condition]
        metrics[condition] = prediction_metrics(shown, truth)
    result = dict(metrics["real"])
    for name, value in metrics["real"].items():
        result[f"reliance_{name}"] = value - metrics["shuffled"][name]
    result["prior_reliance"] = prior_reliance(predictions)
    return result


def prior_vs_stereotype(arms):
    """Does prior_reliance, which knows no truth, rank the arms as the stereotype rate does?

    able: over the arms with at least half of the base's exact matches with the truth. One that
    collapses to a word names no stereotype, and says the same whatever it sees.
    """

    def rank_correlation(judged):
        prior = [metrics["prior_reliance"] for metrics in judged]
        stereotype = [metrics["stereotype_rate"] for metrics in judged]
        return {"rank_correlation": spearman(prior, stereotype)}

    least = arms.get("base", {}).get("exact_match_truth", 0) / 2
    able = [metrics for metrics in arms.values() if metrics["exact_match_truth"] >= least]
    return {"all": rank_correlation(list(arms.values())), "able": rank_correlation(able)}


def world_results(folder):
    """What the files of one world say, as study.json holds it for all.

    A part whose file is missing is left out.
    """
    results = collections.defaultdict(dict)
    truth = {}
    if (folder / "truth.jsonl").exists():
        truth = load_truth(folder)

    for name in JUDGED:
        metrics = arm_metrics(folder / f"eval_{name}", truth)
        if metrics:
            results["arms"][name] = metrics
    if "arms" in results:
        results["prior_reliance"] = prior_vs_stereotype(results["arms"])
    if (folder / "teacher.json").exists():
        results["arms"]["clip"] = json.loads((folder / "teacher.json").read_text())

    for name in ("base", "mmrpt", *MASK_KINDS):
        by_kind = {}
        for kind in MASK_KINDS:
            metrics = arm_metrics(folder / f"eval_{name}_val_{kind}", truth)
            if metrics:
                by_kind[kind] = metrics
        if by_kind:
            on_spans = arm_metrics(folder / f"eval_{name}", truth)
            results["masks"][name] = {"span": on_spans, **by_kind}

    if (folder / "masks_val.jsonl").exists():
        scores = load_records(folder / "scores_val.jsonl")
        results["dependency"] = dependency_metrics(scores, truth)
        results["rules"] = rule_metrics(scores, truth)
    for name in ("base", "mmrpt"):
        path = folder / f"asked_{name}" / "results.json"
        if path.exists():
            scores = json.loads(path.read_text())["real"]
            results["questions"][name] = {
                k: scores[k]["value"] / 100 for k in ("accuracy", "circular")
            }
    for path in sorted([*folder.glob("probe_*.json"), *folder.glob("robustness_*.json")]):
        kind, _, name = path.stem.partition("_")
        results[kind][name] = json.loads(path.read_text())
    return dict(results)


def study_results(out, seeds):
    """world_results() of all worlds, aggregated over the seeds."""
    results = aggregate([world_results(out / f"seed{seed}") for seed in seeds])
    arms = {0.5: results.get("arms", {})}
    for bias in BIAS_ARMS:
        worlds = [world_results(out / f"bias{bias}-seed{seed}") for seed in seeds]
        arms[bias] = aggregate([world.get("arms") for world in worlds])

    results["bias"] = {}
    for bias in sorted(arms):
        names = ("base", *BIAS_ARMS.get(bias, FEW), "clip")
        chosen = [name for name in names if name in arms[bias]]
        results["bias"][str(bias)] = {name: arms[bias][name] for name in chosen}
    return results


def study(out, seeds, small):
    """Runs what is missing of the study, and writes study.json from what is there."""
    lock_output(out / "run.json")
    settings = {
        "seeds": list(seeds),
        "small": small,
        "sizes": {name: size._asdict() for name, size in SIZES.items()},
        "arms": ARMS,
        "bias_arms": BIAS_ARMS,
    }
    if not check_settings(out / "run.json", settings):
        write_json(out / "run.json", {"settings": settings})

    jobs = study_jobs(out, seeds, small)
    failed = run_jobs(jobs, out)
    results = study_results(out, seeds)
    commands = {job.name: job.command for job in jobs}
    content = {"settings": settings, **results, "failed": failed, "jobs": commands}
    write_json(out / "study.json", content)
    write_study_page(out, results)
    print_means(results)

    for name, reason in failed.items():
        print(f"FAILED {name}: {reason}")
    print(f"look at: {out}/study.html, {out}/study.json, {out}/logs/")
    if failed:
        fail(
            f"{len(failed)} jobs of the study failed, or need one that did; the same command tries "
            "them again"
        )
