"""The paper's numbers (arXiv 2603.22241), to stand beside ours. Scores in %."""

from __future__ import annotations

from typing import NamedTuple

#: Table 1. RULER's several values (MV), variable tracking (VT), common words (CWE); BABILong. 4K, 8K; 2K, 4K, 8K.
TABLE_1_COLUMNS = ("MV 4K", "MV 8K", "VT 4K", "VT 8K", "CWE 4K", "CWE 8K", "BABI 2K", "BABI 4K", "BABI 8K")
TABLE_1 = {
    "LLaDA-MoE": (
        (87.90, 92.50, 99.40, 78.84, 69.10, 55.18, 46.00, 45.60, 41.80),
        (95.85, 96.95, 99.52, 94.84, 75.72, 58.20, 59.40, 50.60, 45.60),
        (96.80, 97.00, 99.60, 95.80, 83.70, 61.96, 61.20, 51.20, 47.00),
    ),
    "LLaDA2.1": (
        (98.65, 98.00, 59.32, 43.72, 72.34, 67.08, 56.00, 48.80, 47.40),
        (99.65, 99.00, 88.56, 59.15, 78.96, 68.02, 63.50, 58.50, 55.00),
        (100.00, 99.90, 90.16, 60.72, 80.96, 69.12, 65.20, 61.20, 57.00),
    ),
}

#: Table 2. LLaDA-MoE beyond its context of 8K.
TABLE_2_COLUMNS = ("MV 16K", "MV 32K", "VT 16K", "VT 32K", "CWE 16K", "CWE 32K", "BABI 16K", "BABI 32K")
TABLE_2 = {
    "LLaDA-MoE": (
        (22.35, 14.30, 52.56, 9.48, 44.20, 17.82, 19.20, 6.80),
        (25.48, 15.20, 55.30, 10.35, 54.25, 22.48, 21.00, 8.50),
        (29.40, 15.35, 56.84, 11.44, 57.24, 24.48, 22.20, 9.00),
    ),
}

#: Table 3. LongBench. The paper does not name the backbone; we take the first.
TABLE_3_COLUMNS = (
    *("TriviaQA", "PR-en", "PR-zh", "MF-en", "MF-zh", "2WikiQA"),
    *("DuReader", "MultiNews", "TREC", "SAMSum", "LCC", "RB-P"),
)
TABLE_3 = {
    "LLaDA-MoE": (
        (55.29, 50.32, 74.50, 29.22, 42.47, 21.85, 22.13, 23.52, 70.00, 13.59, 62.55, 54.65),
        (87.74, 54.36, 86.29, 31.44, 42.87, 22.43, 22.19, 26.35, 70.50, 15.80, 64.20, 55.05),
        (87.77, 54.69, 87.38, 31.97, 43.28, 22.61, 22.34, 26.70, 71.00, 16.14, 64.25, 55.23),
    ),
}

#: The rows of each table.
ROWS = ("Standard MDLM", "MemDLM, train only", "MemDLM, train & inference")


class Variant(NamedTuple):
    """One bar of an ablation."""

    label: str
    method: str  #: mdlm, memdlm, or a recipe in recipes/ablations that says what differs from MemDLM
    score: float | None  #: the paper's, on BABILong-1K; none where the ablation is ours


_MEMDLM = Variant("MemDLM", "memdlm", 68.4)

#: Ablations of LLaDA-MoE, by figure.
ABLATIONS = {
    "Inner supervision (figure 5)": (
        Variant("MDLM", "mdlm", 53.8),
        _MEMDLM._replace(label="cross-entropy"),
        Variant("logit KL", "kl", 66.0),
        Variant("reverse KL", "reverse_kl", 62.4),
        Variant("hidden cosine", "hidden_cosine", 58.2),
        Variant("hidden MSE", "hidden_mse", 57.2),
    ),
    "Adapted layers (figure 6)": (
        Variant("FFN 5 %", "ffn_5", 61.6),
        _MEMDLM._replace(label="FFN 10 %"),
        Variant("FFN 25 %", "ffn_25", 62.6),
        Variant("FFN 50 %", "ffn_50", 57.4),
        Variant("FFN + attention", "ffn_attention", 64.8),
        Variant("full φ", "full", 60.2),
    ),
    "Gradient normalisation": (
        _MEMDLM._replace(label="local 1.0"),
        Variant("global 1.0", "clip_global", 63.2),
        Variant("local 0.5", "clip_half", 63.0),
        Variant("local 2.0", "clip_two", 64.0),
        Variant("none", "clip_none", 68.2),
    ),
    "Pre-anchor scale": (
        Variant("1.25", "pre_anchor_125", 62.4),
        _MEMDLM._replace(label="1.5"),
        Variant("1.75", "pre_anchor_175", 67.4),
        Variant("2.0", "pre_anchor_200", 67.8),
    ),
    "Consistency (figure 8)": (
        _MEMDLM._replace(label="anchor-consistent"),
        Variant("inconsistent", "inconsistent", 60.4),
    ),
    "Stages (figure 9)": (
        _MEMDLM._replace(label="both"),
        Variant("both, anchor tokens", "anchor_tokens", 66.8),
        Variant("anchor-to-target", "anchor_only", 64.6),
        Variant("pre-anchor, anchor tokens", "pre_anchor_only_anchor_tokens", 62.0),
        Variant("pre-anchor, all", "pre_anchor_only", 60.4),
    ),
    "Inner steps (figure 10)": (
        _MEMDLM._replace(label="2"),
        Variant("3", "steps_3", 64.4),
        Variant("4", "steps_4", 59.0),
    ),
    "Memory dropout (ours)": (
        _MEMDLM._replace(label="0", score=None),
        Variant("0.25", "dropout_25", None),
        Variant("0.5", "dropout_50", None),
    ),
}

#: Figure 7: anchor ratios at inference, "nearly flat" from 1K to 16K; figures for single bars are not at hand.
ANCHOR_RATIOS = (0.2, 0.3, 0.4, 0.5, 0.8)
