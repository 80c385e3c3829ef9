"""Starts sglang-jax's server with GPT-OSS: `python -m gpt_oss_sglang_jax` takes the engine's own arguments."""

from gpt_oss_sglang_jax.register import register

register()  # at the top: processes that the server spawns import this module again


def main() -> None:
    """Runs the engine's server until it ends."""
    from sgl_jax.launch_server import main as launch

    launch()


if __name__ == "__main__":
    main()
