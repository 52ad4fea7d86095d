"""Run every benchmark: of the engine, the service, the client library and security, and what follows for capacity.

The command line is passed on to the service's part.
"""

import sys

from benchmarks import capacity, engine, library, neighbours, secured, service, where


def main() -> int:
    """Run all parts.

    Returns:
        The exit code: the first that is not 0.
    """
    return (
        engine.main([])
        or service.main(sys.argv[1:])
        or library.main([])
        or where.main([])
        or secured.main([])
        or neighbours.main([])
        or capacity.main(["--charts"] if "--charts" in sys.argv else [])
    )


if __name__ == "__main__":
    raise SystemExit(main())
