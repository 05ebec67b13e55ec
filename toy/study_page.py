"""study.json for people: the page study.html, and the means on the screen."""

from common.records import load_records
from common.results import mask_index, read_predictions
from report.curves import read_metrics, training_figures
from report.figures import as_svg, line_chart
from report.pages import page
from report.results import example_sections
from toy.corruptions import CORRUPTIONS
from toy.study_jobs import ARMS
from toy.world import load_world_image

TRUTH = "exact_match_truth"
STEREOTYPE_RATE = "stereotype_rate"
ARM_SCORES = (TRUTH, STEREOTYPE_RATE, "reliance_exact_match_truth", "prior_reliance")
MASK_SCORES = ("mask_precision", "mask_recall", "f1", "word_precision", "word_recall")
LAYER_SCORES = (
    "dependency_auroc",
    "dependency_auroc_corrected",
    "dependency_corrected_vs_ablation_rank_correlation",
)
# what is printed, and what it is called there
PRINTED = {
    TRUTH: "exact match truth",
    STEREOTYPE_RATE: "stereotype rate",
    "reliance_exact_match_truth": "reliance",
    "prior_reliance": "prior reliance",
    "rank_correlation": "rank correlation",
    "accuracy": "accuracy",
    "circular": "circular",
    "dependency_auroc": "AUROC published",
    "dependency_auroc_corrected": "AUROC corrected",
    "ablation_auroc": "AUROC ablation",
    "mask_precision": "mask precision",
    "mask_recall": "mask recall",
}
# strengths of the text corruption, in words
FALSE_SENTENCE = "0: without, 1: with a false sentence"


def in_words(name):
    """'stereotype_rate' gives 'stereotype rate'."""
    return name.replace("_", " ")


def transpose(table):
    """{a: {b: x}} as {b: {a: x}}."""
    columns = {}
    for a, row in table.items():
        for b, x in row.items():
            columns.setdefault(b, {})[a] = x
    return columns


# ---------------------------------------------------------------- tables and figures


def cell(number):
    """'0.463 ± 0.080' of a mean_std(); an empty string if no seed has the number."""
    if not number or number["mean"] is None:
        return ""
    if number["std"] is None:
        return f"{number['mean']:.3f}"
    return f"{number['mean']:.3f} ± {number['std']:.3f}"


def table_section(title, note, rows, metrics):
    """A section of the page with one table; rows: {name: {metric: mean_std()}}."""
    table = {"columns": ["", *map(in_words, metrics)], "rows": []}
    for name, numbers in rows.items():
        cells = [cell(numbers.get(metric)) for metric in metrics]
        if any(cells):
            table["rows"].append([name, *cells])
    return {"title": title, "note": note, "table": table, "figures": []}


def figure_section(title, note, figures):
    """A section of the page with figures; None stands for one without a point."""
    figures = [as_svg(figure) for figure in figures if figure is not None]
    return {"title": title, "note": note, "table": None, "figures": figures}


def points(line, metric):
    """[(x, mean, mean - std, mean + std)] of {x as text: {metric: mean_std()}}."""
    result = []
    for x, numbers in line.items():
        number = numbers.get(metric)
        if number and number["mean"] is not None:
            mean = number["mean"]
            std = number["std"] or 0
            result.append((float(x), mean, mean - std, mean + std))
    return result


def metric_chart(title, lines, metric, xlabel):
    """lines: {name: {x as text: {metric: mean_std()}}}."""
    drawn = {name: points(line, metric) for name, line in lines.items()}
    return line_chart(title, drawn, xlabel, in_words(metric))


# ---------------------------------------------------------------- sections


def arm_label(name):
    """The name of an arm with its flags."""
    if name not in ARMS:
        return name
    return " ".join([name, *ARMS[name].mask, *ARMS[name].train])


def arms_section(results):
    note = (
        "Same base, updates, images and judge. mmrpt: the defaults (spans, both components, "
        "relative to a pool, grpo). Every other arm changes what its flags say."
    )
    arms = {arm_label(name): numbers for name, numbers in results.get("arms", {}).items()}
    return table_section("What makes the difference?", note, arms, ARM_SCORES)


def prior_section(results):
    note = (
        "Prior reliance knows no truth. Its rank correlation with the stereotype rate, over all "
        "arms of a world, and over the able ones: those with at least half of the base's exact "
        "matches."
    )
    title = "Does prior reliance follow the stereotype rate?"
    return table_section(title, note, results.get("prior_reliance", {}), ["rank_correlation"])


def questions_section(results):
    note = "Multiple choice about painted colours, after a short tuning on questions."
    rows = results.get("questions", {})
    return table_section("And on questions?", note, rows, ["accuracy", "circular"])


def masks_section(results):
    note = (
        "Policies trained on default spans (mmrpt), random spans and whole sentences, each judged "
        "on all of them. A whole sentence can be put in four ways, so exact matches are few."
    )
    rows = {}
    for name, by_kind in results.get("masks", {}).items():
        rows[name] = {}
        for kind, numbers in by_kind.items():
            for metric in (TRUTH, STEREOTYPE_RATE):
                rows[name][f"{kind}: {metric}"] = numbers.get(metric)
    return table_section("Which masks?", note, rows, list(transpose(rows)))


def bias_section(results):
    note = (
        "By the share of objects to which captions give the stereotype colour. clip: the teacher's "
        "choice among the colours of objects that have another one."
    )
    lines = transpose(results.get("bias", {}))
    xlabel = "bias of the captions"
    figures = []
    for metric in (TRUTH, STEREOTYPE_RATE):
        figures.append(metric_chart(in_words(metric), lines, metric, xlabel))
    return figure_section("And the descriptive bias?", note, figures)


def dependency_sections(results):
    dependency = dict(results.get("dependency", {}))
    corrections = dependency.pop("corrections", {})
    title = "Does the score of stage 1 find what needs the image?"
    note = (
        "AUROC: the chance that a sentence or word which needs the image scores above one that "
        "does not. D_vis as published, and its two corrections; a word by the attention rows that "
        "produce it, or by its own."
    )
    yield table_section(title, note, corrections, list(transpose(corrections)))
    rows = {in_words(name): {"value": number} for name, number in dependency.items()}
    note = "corrected: by the default of stage 1. Rank correlations are with the image ablation."
    yield table_section("Beside the image ablation", note, rows, ["value"])

    layers = {name: probe.get("layers", {}) for name, probe in results.get("probe", {}).items()}
    figures = []
    for metric in LAYER_SCORES:
        figures.append(metric_chart(in_words(metric), layers, metric, "decoder layer, from 0"))
    note = "D_vis of one decoder layer alone; corrected by the position baseline."
    yield figure_section("In which layers?", note, figures)


def rules_section(results):
    note = "What the masks of each rule of build_masks.py hit."
    return table_section("Which threshold?", note, results.get("rules", {}), MASK_SCORES)


def patches_section(results):
    note = (
        "Exact match with the truth by the number of patches, of 16, that are hidden: those that "
        "the sentence of the mask attends to most or least, any, or any of other objects."
    )
    figures = []
    for name, probe in results.get("probe", {}).items():
        patches = dict(probe.get("patches", {}))
        untouched = patches.pop("0", {}).get("none", {})
        lines = {}
        for which, line in transpose(patches).items():
            lines[which] = {"0": untouched, **line}
        figures.append(metric_chart(name, lines, TRUTH, "hidden patches"))
    return figure_section("Is it causal?", note, figures)


def robustness_section(results):
    note = (
        "Exact match with the truth by strength. sft and sft_sft: without MMRPT, with as many "
        "updates of SFT, and of both stages; mmrpt_sft: MMRPT, then SFT. Text: a false sentence "
        "about the hidden object in place of one about another."
    )
    figures = []
    for kind in (*CORRUPTIONS, "text"):
        lines = {}
        for name, tests in results.get("robustness", {}).items():
            line = dict(tests.get(kind, {}))
            line.pop("mean", None)
            if kind != "text":
                line = {**tests.get("none", {}), **line}
            lines[name] = line
        xlabel = FALSE_SENTENCE if kind == "text" else "strength"
        figures.append(metric_chart(kind, lines, TRUTH, xlabel))
    return figure_section("More robust after supervised fine-tuning?", note, figures)


def training_section(world):
    note = "Faint: every update; bold: the mean over the last few."
    figures = training_figures(read_metrics(world / "mmrpt" / "metrics.jsonl"))
    return figure_section(f"Training: mmrpt, {world.name}", note, figures)


def first_trained_world(out):
    """The folder of the first seed whose mmrpt has been evaluated, or None."""
    for world in sorted(out.glob("seed*")):
        if (world / "eval_mmrpt" / "results.json").exists():
            return world
    return None


def write_study_page(out, results):
    """Writes OUT/study.html: study.json as tables and figures, then curves and examples."""
    sections = [
        arms_section(results),
        prior_section(results),
        questions_section(results),
        masks_section(results),
        bias_section(results),
        *dependency_sections(results),
        rules_section(results),
        patches_section(results),
        robustness_section(results),
    ]
    examples = []
    world = first_trained_world(out)
    if world is not None:
        sections.append(training_section(world))
        examples = examples_of(world)
    page(
        "study.html",
        out / "study.html",
        title="The claims, tested in the toy world",
        summary="Numbers are means ± one standard deviation over the seeds, on held-out captions.",
        sections=[section for section in sections if has_content(section)],
        examples=examples,
    )


def examples_of(world):
    """Masks that mmrpt fills better or worse than the base, as on the page of evaluate.py."""
    masks = {mask_index(mask): mask for mask in load_records(world / "masks_val.jsonl")}

    def load_example(index):
        mask = masks[index]
        return [load_world_image(world, mask["image"])], mask["sentence"]

    predictions, _ = read_predictions(world / "eval_mmrpt")
    before, _ = read_predictions(world / "eval_base")
    return example_sections(predictions, before, load_example)


def has_content(section):
    return bool(section["figures"]) or bool(section["table"] and section["table"]["rows"])


# ---------------------------------------------------------------- the screen


def print_means(results):
    """A line for each dict of numbers: mean ± standard deviation over the seeds."""
    header = None
    for path, part in parts_with_numbers(results):
        metrics = [metric for metric in PRINTED if cell(part.get(metric))]
        # study.json has every strength of a corruption
        is_one_strength = bool(set(path) & set(CORRUPTIONS)) and path[-1] != "mean"
        if not metrics or is_one_strength:
            continue
        if header != (path[0], metrics):
            header = (path[0], metrics)
            print(f"\n{'':38s}" + "".join(f"{PRINTED[metric]:20s}" for metric in metrics))
        print(f"{' '.join(path):38s}" + "".join(f"{cell(part[metric]):20s}" for metric in metrics))


def parts_with_numbers(results, path=()):
    """Yields (path of keys, dict) of every dict in nested results that is no mean_std() itself."""
    for key, part in results.items():
        if isinstance(part, dict) and "values" not in part:
            yield (*path, key), part
            yield from parts_with_numbers(part, (*path, key))
