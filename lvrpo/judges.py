"""Which models judge a run of LVRPO: their flags, and loading those that a weight needs."""

from pathlib import Path

from common.clip import add_clip_flags
from common.judges import Knowledge, load_detector
from common.records import fail
from reward import ClipScorer


def add_judge_flags(parser):
    """Which models judge."""
    note = "ins: Owlv2 or GroundingDINO, a hub id or folder; or a function, module:function"
    parser.add_argument("--detector", help=note)
    parser.add_argument("--knowledge", help="kn: a VLM other than --model, a hub id or folder")
    add_clip_flags(parser, "ViT-B-16-SigLIP2", "webli")


def load_judges(args, device):
    """(clip, detector, knowledge) of the parsed flags; None for one that no weight needs."""
    drawing = {name for name, weight in args.draw_reward.items() if weight}
    reading = {name for name, weight in args.read_reward.items() if weight}
    clip = None
    detector = None
    knowledge = None
    if "ins" in drawing and not args.detector:
        fail("--draw-reward ins needs a --detector")
    # a model that finds objects does not name their colours
    needs_colours = "ins" in drawing and ":" not in args.detector
    if drawing & {"sem", "dense"} or "sem" in reading or needs_colours:
        clip = ClipScorer(args.clip, args.clip_weights, device=device)
    if "ins" in drawing:
        detector = load_detector(args.detector, clip, device)
    if "kn" in drawing | reading:
        knowledge = load_knowledge(args, device)
    return clip, detector, knowledge


def load_knowledge(args, device):
    """The Knowledge of --knowledge, which is never the policy: it would judge itself."""
    if not args.knowledge:
        fail("the component kn needs --knowledge, a vision-language model other than --model")
    if Path(args.knowledge).resolve() == Path(args.model).resolve():
        fail(f"--knowledge {args.knowledge} is --model: a policy may not judge itself")
    return Knowledge(args.knowledge, device)
