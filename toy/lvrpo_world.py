"""LVRPO where the truth is known: `python toy_world.py --lvrpo`.

A tiny Janus learns to read and to draw from captions that lie about colours. Then it is trained to
read, to draw, or both, and compared with imitation. The captions of held-out prompts tell the
truth, and the images are so simple that an exact detector says what a drawing shows.

OUT/lvrpo.json, of base, sft, drawing, reading and both:
    reading     exact_match_truth, stereotype_rate and exact_match_caption, as in toy_world.py
    guidance 1, guidance 2, greedy: of the drawings
      right     share of drawings that show all that the prompt says, and nothing else
      overall   its mean over tags, here numbers of shapes
      stereotype_obeyed, other_obeyed
                share of shapes of the right colour, where the prompt says the stereotype colour of
                the kind, or another
      place, kind, size
                share of shapes that are there, of the right kind, of the right size
      sem, kn   r_sem and r_kn, judges that gave no verdict; of guidance 1 only
      diversity share of drawings that show something else than the samples of the same prompt
                before them; of guidance 1, with four samples
    ceiling     share of held-out images that are still right after the VQ-VAE
    seconds     by stage; "in all" is elapsed time
"""

import collections
import json
from pathlib import Path

import torch

from common.drawings import codes_of_drawings, drawings_of_codes
from common.records import load_records, write_json
from common.vlm import load_vlm
from report.drawings import drawings_figure
from report.figures import save_png
from toy.drawing import nearest
from toy.lvrpo_stages import MODELS, SAMPLINGS, drawings_folder
from toy.metrics import mean, prediction_metrics
from toy.world import STEREOTYPE, load_truth, load_world_image

# shown per prompt on the sheet
SHOWN = 4


def measure(out):
    """The contents of lvrpo.json, without the seconds, from the files of the stages in `out`."""
    truth = load_truth(out)
    prompts = {record["id"]: record for record in load_records(out / "prompts_val.jsonl")}
    results = {"ceiling": ceiling(out, prompts.values())}
    for name in MODELS:
        predictions = load_records(out / f"eval_{name}" / "predictions.jsonl")
        shown = [p for p in predictions if p["condition"] == "real"]
        results[name] = {"reading": prediction_metrics(shown, truth)}
        for sampling, *_ in SAMPLINGS:
            folder = Path(drawings_folder(out, name, sampling))
            drawings = load_records(folder / "drawings.jsonl")
            scores = json.loads((folder / "results.json").read_text())["drawing"]
            measured = drawing_metrics(drawings, prompts)
            for metric in ("overall", "sem", "kn"):
                if metric in scores:
                    measured[metric] = scores[metric]["value"] / 100
            measured["diversity"] = diversity(folder, drawings)
            results[name][sampling] = measured
    return results


def drawing_metrics(drawings, prompts):
    """Shares of drawings that are right, and of shapes by what is right about them."""
    shares = collections.defaultdict(list)
    for drawing in drawings:
        shares["right"].append(drawing["right"])
        holds = dict(drawing["clauses"])
        include = prompts[drawing["id"]]["include"]
        # three requirements per shape: see requirements() of toy/drawing.py
        for coloured, kind, size in zip(include[::3], include[1::3], include[2::3]):
            is_usual = STEREOTYPE[kind["class"].split()[0]] == coloured["color"]
            obeyed = holds[f"{coloured['color']} {coloured['class']}"]
            shares["stereotype_obeyed" if is_usual else "other_obeyed"].append(obeyed)
            shares["place"].append(holds[f"1 {coloured['class']}"])
            shares["kind"].append(holds[f"1 {kind['class']}"])
            shares["size"].append(holds[f"1 {size['class']}"])
    return {name: mean(values) for name, values in shares.items()}


def diversity(folder, drawings):
    """The share of drawings that show something else than earlier samples of their prompt."""
    shown = set()
    for drawing in drawings:
        content = nearest(load_world_image(folder, drawing["image"]))
        shown.add((drawing["id"], *content.values()))
    return len(shown) / len(drawings)


def ceiling(out, prompts):
    """The share of images that the VQ-VAE of the base keeps right: no drawing can do better."""
    model, processor = load_vlm(str(out / "base"), torch.device("cpu"))
    images = [load_world_image(out, prompt["image"]) for prompt in prompts]
    drawn = drawings_of_codes(model, processor, codes_of_drawings(model, processor, images))
    return mean([nearest(image) == nearest(copy) for image, copy in zip(images, drawn)])


def print_results(out, results):
    """The table, at most 100 columns wide."""
    rows = (
        ("all right, guidance 1", "guidance 1", "right"),
        ("all right, guidance 2", "guidance 2", "right"),
        ("all right, greedy", "greedy", "right"),
        ("GenEval's overall, guidance 1", "guidance 1", "overall"),
        ("stereotype colour obeyed", "guidance 1", "stereotype_obeyed"),
        ("other colour obeyed", "guidance 1", "other_obeyed"),
        ("r_sem, CLIP", "guidance 1", "sem"),
        ("r_kn, P(yes) of a copy of the base", "guidance 1", "kn"),
        ("different among four drawings", "guidance 1", "diversity"),
        ("exact match with the truth", "reading", "exact_match_truth"),
        ("stereotype rate (lower is better)", "reading", "stereotype_rate"),
    )
    print(f"\n{'held-out prompts and masks':36s}" + "".join(f"{name:>10s}" for name in MODELS))
    for label, part, metric in rows:
        if part == "reading" and metric == "exact_match_truth":
            print()
        values = [results[name][part][metric] for name in MODELS]
        print(f"{label:36s}" + "".join(f"{value:10.3f}" for value in values))
    minutes = results["seconds"]["in all"] / 60
    print(
        f"\nNo drawing can be right more often than the images that the VQ-VAE has seen: "
        f"{results['ceiling']:.3f}.\n"
        f"Drawings before and after training: {out}/drawings.png\n"
        f"Every number: {out}/lvrpo.json ({minutes:.1f} minutes in all)"
    )


def write_sheet(out, path, names=("base", "sft", "both")):
    """Drawings of the same prompts by several models, as one picture."""
    prompts = load_records(out / "prompts_val.jsonl")
    columns = {}
    for name in names:
        folder = Path(drawings_folder(out, name, "guidance 1"))
        columns[name] = collections.defaultdict(list)
        for drawing in load_records(folder / "drawings.jsonl"):
            image = load_world_image(folder, drawing["image"])
            columns[name][drawing["id"]].append((image, drawing["right"]))
    chosen = telling_prompts(prompts, columns[names[0]])
    save_png(drawings_figure(chosen, columns), path)


def telling_prompts(prompts, drawn, count=4):
    """Prompts for stereotype colours, those first whose drawings by the base are not all alike."""
    telling = []
    others = []
    for prompt in prompts:
        if not drawn[prompt["id"]]:
            continue
        verdicts = {right for _, right in drawn[prompt["id"]]}
        kinds = [wanted["class"].split()[0] for wanted in prompt["include"][1::3]]
        colours = [wanted["color"] for wanted in prompt["include"][::3]]
        usual = [STEREOTYPE[kind] == colour for kind, colour in zip(kinds, colours)]
        is_telling = len(verdicts) == 2 and any(usual) and len(kinds) < 3
        (telling if is_telling else others).append(prompt)
    return [*telling, *others][:count]


def report(out, results):
    """Writes lvrpo.json and drawings.png, and prints the table."""
    write_json(out / "lvrpo.json", results)
    write_sheet(out, out / "drawings.png")
    print_results(out, results)
