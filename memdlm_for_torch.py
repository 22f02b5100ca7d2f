"""What torch runs when it is imported (entry point `torch.backends`): tells lm-eval of our model; see plugin.py.

Installations have this file beside the package, not in it (setup.cfg), also those that point to a checkout. So torch
finds it when the checkout has moved, too; an entry point that is not there breaks its import.
"""


def install() -> None:
    """Install the hook of plugin.py, if there is one. Never fails."""
    try:
        from dllm_memdlm.evaluation.plugin import install
    except Exception:  # whatever is wrong with the package is not torch's matter
        return
    install()
