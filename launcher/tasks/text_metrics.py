"""How near written texts are to the true ones: BLEU and chrF by sacrebleu, ROUGE by torchmetrics."""

from collections.abc import Sequence

ROUGE = ("rouge1", "rouge2", "rougeL")


def text_metrics(written: Sequence[str], targets: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Compare texts with one true text each.

    Args:
        written: by the model.
        targets: the true ones, in the same order.
        wanted: of `bleu`, `chrf` and `rouge`.

    Returns:
        `bleu` (Post, arXiv 1804.08771; 0 to 100) and `chrf` (Popovic, W15-3049; 0 to 100) of all texts together, and
        the means of ROUGE's F measures (Lin, W04-1013; 0 to 1) over texts.
    """
    values: dict[str, float] = {}
    if "bleu" in wanted:
        from sacrebleu.metrics import BLEU

        values["bleu"] = float(BLEU().corpus_score(written, [targets]).score)
    if "chrf" in wanted:
        from sacrebleu.metrics import CHRF

        values["chrf"] = float(CHRF().corpus_score(written, [targets]).score)
    if "rouge" in wanted:
        from torchmetrics.functional.text import rouge_score

        found = rouge_score(list(written), list(targets), rouge_keys=ROUGE)
        values |= {name: float(found[f"{name}_fmeasure"]) for name in ROUGE}
    return values
