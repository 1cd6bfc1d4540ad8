"""The task the benchmarks start: it says one word and returns."""

from helmr import task


@task("noop")
def noop() -> None:
    """Say one word."""
    print("x", flush=True)
