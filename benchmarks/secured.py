"""Show what TLS, tokens and metrics cost a streamed chunk.

Run as ``python -m benchmarks.secured``. Three servers in turn: plaintext without a login and without metrics; the same
with metrics; and one with TLS, tokens and metrics. Each has a client process of its own; all share one store.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import trustme
from tqdm import tqdm

from benchmarks.harness import RESULTS, write_document
from benchmarks.load.bench_rates import OURS, SCENARIOS
from benchmarks.load.lab import Lab, Plan, Samples, laboratory
from benchmarks.load.machine import describe_machine, machine_line
from benchmarks.load.page import write_block
from benchmarks.load.rows import Bar, Ratio, paired, ratio_table
from benchmarks.load.weigh import weigh
from benchmarks.load.workload import SMALL
from service.security.roles import Role
from service.security.tokens import create_token

COMMAND = "python -m benchmarks.secured --write"
SHOWN = ("stream-64", "frames-64", "stream-1")
PLAIN, METERED, SECURED = "plaintext", "metrics", "TLS, tokens, metrics"
METRICS = ("--metrics-listen", "127.0.0.1:0")
RATE_BAR = Bar(0.85)
METRICS_BAR = Bar(1.03, at_most=True)
# What is compared: the server, where the samples hold the figure, its unit, and the bar of the ratio.
FIGURES = (
    (SECURED, "rate", "chunks/s", RATE_BAR),
    (SECURED, "server_us", "server µs", None),
    (METERED, "rate", "chunks/s", None),
    (METERED, "server_us", "server µs", METRICS_BAR),
)


@dataclass(frozen=True)
class Contestant:
    """One way of running the server.

    Attributes:
        name: For the tables.
        options: Of `timernn serve`.
        login: Of the client's command line.
    """

    name: str
    options: tuple[str, ...] = ()
    login: tuple[str, ...] = ()


def contestants(folder: Path) -> list[Contestant]:
    """Return the three ways; what the last one needs is written into a folder."""
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    names = ("ca.crt", "tls.crt", "tls.key", "tokens.toml", "client.token")
    ca, cert, key, tokens, token_file = (folder / name for name in names)
    authority.cert_pem.write_to_path(ca)
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    key.chmod(0o600)
    token, _ = create_token(tokens, Role.ADMIN, "default", name="bench", expires=None)
    token_file.write_text(token)
    files = ("--tls-cert", str(cert), "--tls-key", str(key), "--tokens", str(tokens))
    return [
        Contestant(PLAIN),
        Contestant(METERED, METRICS),
        Contestant(
            SECURED,
            (*files, *METRICS),
            ("--tls-ca", str(ca), "--token-file", str(token_file)),
        ),
    ]


def measure(
    lab: Lab, repetitions: int, tick: Callable[[str], None] = lambda _text: None
) -> list[Samples]:
    """Weigh a chunk in each scenario with each server, in turn; see `weigh` for what comes."""
    ways = contestants(lab.folder)
    samples = [Samples(scenario, way.name) for scenario in SHOWN for way in ways]
    for _ in range(repetitions):
        for one, way in zip(samples, ways * len(SHOWN), strict=True):
            server = lab.server(OURS, SMALL, *way.options)
            client = lab.client(OURS, SMALL, *way.options, login=way.login)
            scenario = SCENARIOS[one.scenario]
            one.results.append(weigh(lab, scenario, way.name, server=server, client=client))
            tick(f"{one.scenario}: {way.name}")
    return samples


def compared(samples: Sequence[Samples]) -> Iterator[Ratio]:
    """Set each way beside plaintext, each repetition with the one measured beside it."""
    values = {(one.scenario, one.server): one for one in samples}
    for scenario in SHOWN:
        for name, key, unit, bar in FIGURES:
            ours = values[scenario, name].values(key)
            plain = values[scenario, PLAIN].values(key)
            # The bars are for what is streamed over many sessions; the others show where it comes from.
            held = bar if scenario == SHOWN[0] else None
            yield paired(f"{scenario}, {name}: {unit}", ours, plain, held)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write.

    Returns:
        The exit code: not 0 only where something could not be measured.
    """
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    plan = Plan(seconds=options.seconds, repetitions=options.repetitions)
    with tqdm(total=3 * len(SHOWN) * options.repetitions, unit="run") as progress:

        def tick(text: str) -> None:
            progress.set_postfix_str(text)
            progress.update()

        with laboratory(plan) as lab:
            rows = list(compared(measure(lab, options.repetitions, tick)))
    machine = describe_machine()
    write_document(
        options.json, machine=machine, command=COMMAND, results=[row.as_json() for row in rows]
    )
    text = f"{machine_line(machine)}.\n\n{ratio_table(rows, 'with', PLAIN)}"
    print("\n" + text)
    if options.write:
        write_block(COMMAND, text)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.secured", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=15, help="of each measurement")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one measurement")
    parser.add_argument("--json", type=Path, default=RESULTS / "secured.json")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
