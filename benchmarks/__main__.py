"""Run every benchmark: the engine, then the service. The command line is passed on to the service's part."""

import sys

from benchmarks import engine, service


def main() -> int:
    """Run both parts.

    Returns:
        The exit code: the first that is not 0.
    """
    return engine.main([]) or service.main(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
