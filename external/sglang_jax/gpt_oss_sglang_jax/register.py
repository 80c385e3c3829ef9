"""Makes GPT-OSS and drafts with YaRN known to sglang-jax, whose files stay as they are.

The engine (0.1.0rc0, and its repository in August 2026) has no entry point for models from outside: a class is added
to its registry. Its DFLASH worker takes the draft's class from the module `sgl_jax.srt.models.dflash`, so that one name
is set there.
"""


def register() -> None:
    """Registers both classes; to do it twice does no harm."""
    from sgl_jax.srt.models import dflash
    from sgl_jax.srt.models.registry import ModelRegistry

    from gpt_oss_sglang_jax.draft import DFlashDraftModel
    from gpt_oss_sglang_jax.model import GptOssForCausalLM

    ModelRegistry.models["GptOssForCausalLM"] = GptOssForCausalLM
    ModelRegistry.models["DFlashDraftModel"] = DFlashDraftModel
    dflash.DFlashDraftModel = DFlashDraftModel
