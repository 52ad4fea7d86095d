import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from instruments.dialects import SCRIPT_CALLS, GrpcDialect, RespDialect
from instruments.proxy import FaultProxy, Faults, Link
from instruments.proxy_process import ProxyProcess


class Echo(socketserver.BaseRequestHandler):
    """Send back what comes."""

    def handle(self) -> None:
        """Echo until the client ends."""
        try:
            while data := self.request.recv(65536):
                self.request.sendall(data)
        except ConnectionError:
            return


class FakeRedis(socketserver.StreamRequestHandler):
    """Answer every command with +OK and remember its name."""

    def handle(self) -> None:
        """Read arrays of bulk strings."""
        while head := self._line():
            words = [self._bulk() for _ in range(int(head[1:]))]
            seen.append(words[0].decode())
            self.wfile.write(b"+OK\r\n")

    def _line(self) -> bytes:
        try:
            return self.rfile.readline()
        except ConnectionError:
            return b""

    def _bulk(self) -> bytes:
        size = int(self.rfile.readline()[1:])
        return self.rfile.read(size + 2)[:-2]


seen: list[str] = []


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True


class UnixServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True


@contextlib.contextmanager
def serving(server: socketserver.BaseServer) -> Iterator[None]:
    """Run a server in a thread."""
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield
        server.shutdown()
        thread.join()


@pytest.fixture
def echo() -> Iterator[str]:
    """The address of a server that sends back what comes."""
    server = Server(("127.0.0.1", 0), Echo)
    with serving(server):
        yield f"127.0.0.1:{server.server_address[1]}"


@pytest.fixture
def redis() -> Iterator[str]:
    """The address of a server that speaks just enough RESP."""
    seen.clear()
    server = Server(("127.0.0.1", 0), FakeRedis)
    with serving(server):
        yield f"127.0.0.1:{server.server_address[1]}"


def connect(proxy: FaultProxy | ProxyProcess) -> socket.socket:
    """Connect to the proxy, with a time limit on each read."""
    host, port = proxy.address.split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def read(client: socket.socket, size: int) -> bytes:
    """Read exactly `size` bytes, fewer at the end of the stream."""
    data = b""
    while len(data) < size and (more := client.recv(size - len(data))):
        data += more
    return data


def test_without_faults_every_byte_passes(echo: str) -> None:
    """A healthy proxy changes nothing and counts no fault."""
    sent = bytes(range(256)) * 4096
    with FaultProxy(echo) as proxy, connect(proxy) as client:
        threading.Thread(target=client.sendall, args=(sent,)).start()
        assert read(client, len(sent)) == sent
        assert proxy.counts["bytes_up"] == len(sent)
        assert proxy.fault_count == 0


def test_an_end_of_stream_is_passed_on(echo: str) -> None:
    """A half-closed client still gets its answer, then the end."""
    with FaultProxy(echo) as proxy, connect(proxy) as client:
        client.sendall(b"last words")
        client.shutdown(socket.SHUT_WR)
        assert read(client, 100) == b"last words"


def test_upstream_may_be_a_unix_socket(tmp_path: Path) -> None:
    """The embedded store listens on a path."""
    path = str(tmp_path / "s")
    with (
        serving(UnixServer(path, Echo)),
        FaultProxy(f"unix:{path}") as proxy,
        connect(proxy) as client,
    ):
        client.sendall(b"hello")
        assert read(client, 5) == b"hello"


def test_latency_delays_and_does_not_add_up(echo: str) -> None:
    """Each chunk comes at least the latency later, both directions counted."""
    link = Link(latency_s=0.05, jitter_s=0.01)
    with FaultProxy(echo, faults=Faults(up=link, down=link)) as proxy, connect(proxy) as client:
        start = time.monotonic()
        client.sendall(b"x")
        assert read(client, 1) == b"x"
        assert time.monotonic() - start >= 0.08
        assert proxy.counts["delay"] >= 2


def test_bandwidth_bounds_the_pace(echo: str) -> None:
    """20 kB through 100 kB/s take at least most of 0.2 s."""
    faults = Faults(down=Link(bandwidth_bytes_per_s=100_000))
    with FaultProxy(echo, faults=faults) as proxy, connect(proxy) as client:
        start = time.monotonic()
        client.sendall(b"x" * 20_000)
        assert len(read(client, 20_000)) == 20_000
        assert time.monotonic() - start >= 0.15


def test_slicer_cuts_chunks_into_pieces(echo: str) -> None:
    """Sliced bytes arrive whole and in order."""
    with (
        FaultProxy(echo, faults=Faults(up=Link(slice_bytes=7, slice_gap_s=0.001))) as proxy,
        connect(proxy) as client,
    ):
        client.sendall(bytes(range(70)))
        assert read(client, 70) == bytes(range(70))
        assert proxy.counts["slow_piece"] >= 10


def test_blackhole_swallows_and_resets_once_lifted(echo: str) -> None:
    """A connection with a hole in its bytes never carries later ones."""
    with FaultProxy(echo, faults=Faults(down=Link(blackhole=True))) as proxy:
        with connect(proxy) as client:
            client.sendall(b"lost")
            client.settimeout(0.1)
            with pytest.raises(TimeoutError):
                client.recv(1)
            proxy.set(Faults())
            client.settimeout(10)
            client.sendall(b"more")
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        assert proxy.counts["blackhole_bytes"] == 4


def test_vanished_connections_are_silent_and_new_ones_work(echo: str) -> None:
    """No bytes, no end and no reset, as after a router that forgot them."""
    with FaultProxy(echo) as proxy, connect(proxy) as old:
        old.sendall(b"a")
        assert read(old, 1) == b"a"
        assert proxy.vanish_all() == 1
        old.sendall(b"lost")
        old.settimeout(0.1)
        with pytest.raises(TimeoutError):
            old.recv(1)
        with connect(proxy) as new:
            new.sendall(b"b")
            assert read(new, 1) == b"b"
        assert proxy.counts["vanish"] == 1


def test_stall_keeps_and_delivers_once_lifted(echo: str) -> None:
    """A partition that heals loses nothing."""
    with FaultProxy(echo, faults=Faults(up=Link(stall=True))) as proxy, connect(proxy) as client:
        client.sendall(b"patience")
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(1)
        proxy.set(Faults())
        client.settimeout(10)
        assert read(client, 8) == b"patience"


def test_reset_is_a_reset_and_close_is_an_end(echo: str) -> None:
    """A reset connection raises at the client, a closed one just ends."""
    with FaultProxy(echo) as proxy:
        with connect(proxy) as client:
            client.sendall(b"a")
            assert read(client, 1) == b"a"
            assert proxy.reset_all() == 1
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        with connect(proxy) as client:
            client.sendall(b"a")
            assert read(client, 1) == b"a"
            assert proxy.close_all() == 1
            assert client.recv(1) == b""
        assert (proxy.counts["reset"], proxy.counts["close"]) == (1, 1)


def test_limit_data_ends_after_so_many_bytes(echo: str) -> None:
    """The client gets exactly the bytes allowed, then the end of the stream."""
    faults = Faults(down=Link(limit_bytes=10))
    with FaultProxy(echo, faults=faults) as proxy, connect(proxy) as client:
        client.sendall(b"x" * 25)
        assert read(client, 25) == b"x" * 10
        assert proxy.counts["limit_data"] == 1


def test_slow_close_passes_the_end_late(echo: str) -> None:
    """The end of the stream comes at least so much later."""
    with FaultProxy(echo, faults=Faults(slow_close_s=0.05)) as proxy, connect(proxy) as client:
        start = time.monotonic()
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        assert time.monotonic() - start >= 0.05


def test_refuse_and_a_dead_upstream_reset_new_connections(echo: str) -> None:
    """Both look the same to a client; only the first counts as a fault."""
    with FaultProxy(echo, faults=Faults(refuse=True)) as proxy:
        with pytest.raises(ConnectionResetError), connect(proxy) as client:
            client.recv(1)
        assert proxy.fault_count == 1
        proxy.set(Faults())
        proxy.upstream = "127.0.0.1:1"
        with pytest.raises(ConnectionResetError), connect(proxy) as client:
            client.recv(1)
        assert proxy.fault_count == 1


def command(*args: bytes) -> bytes:
    """Encode a command as a Redis client does."""
    return b"*%d\r\n" % len(args) + b"".join(b"$%d\r\n%s\r\n" % (len(a), a) for a in args)


def test_resp_reply_of_a_script_alone_is_dropped(redis: str) -> None:
    """Replies before it pass, the script ran, its reply is lost, the connection is reset."""
    faults = Faults(drop_reply_p=1.0, only=SCRIPT_CALLS)
    with FaultProxy(redis, dialect=RespDialect, faults=faults) as proxy:
        with connect(proxy) as client:
            client.sendall(command(b"GET", b"k") + command(b"EVALSHA", b"x") + command(b"PING"))
            assert read(client, 5) == b"+OK\r\n"
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        assert proxy.counts["drop_reply"] == 1
    assert seen[:2] == ["GET", "EVALSHA"]


def test_drop_reply_after_hits_exactly_the_ones_named(redis: str) -> None:
    """After two that pass, the next two lose their replies, and no more."""
    outcomes = []
    with FaultProxy(redis, dialect=RespDialect) as proxy:
        proxy.drop_reply_after(2, count=2)
        for _ in range(6):
            with connect(proxy) as client:
                client.sendall(command(b"FCALL"))
                try:
                    outcomes.append(read(client, 5) == b"+OK\r\n")
                except ConnectionResetError:
                    outcomes.append(False)
    assert outcomes == [True, True, False, False, True, True]
    assert seen == ["FCALL"] * 6


def test_reset_p_resets_before_the_request_is_forwarded(redis: str) -> None:
    """The server never sees the request that was reset."""
    faults = Faults(reset_p=1.0)
    with (
        FaultProxy(redis, dialect=RespDialect, faults=faults) as proxy,
        connect(proxy) as client,
    ):
        client.sendall(command(b"SET"))
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert seen == []


def test_the_same_seed_drops_the_same_replies(redis: str) -> None:
    """Two runs with one seed agree, another seed differs."""

    def run(seed: int) -> list[bool]:
        faults, outcomes = Faults(drop_reply_p=0.5), []
        with FaultProxy(redis, dialect=RespDialect, seed=seed, faults=faults) as proxy:
            for _ in range(20):
                with connect(proxy) as client:
                    client.sendall(command(b"SET"))
                    try:
                        outcomes.append(bool(client.recv(5)))
                    except ConnectionResetError:
                        outcomes.append(False)
        return outcomes

    assert run(1) == run(1) != run(2)


def test_hold_keeps_the_reply_until_released(redis: str) -> None:
    """The work is done and the reply waits at the proxy."""
    released = threading.Event()
    with FaultProxy(redis, dialect=RespDialect) as proxy, connect(proxy) as client:
        reached = proxy.hold_reply_until(released)
        client.sendall(command(b"FCALL"))
        assert reached.wait(10)
        assert seen == ["FCALL"]
        client.settimeout(0.05)
        with pytest.raises(TimeoutError):
            client.recv(1)
        released.set()
        client.settimeout(10)
        assert read(client, 5) == b"+OK\r\n"


class Calls(grpc.GenericRpcHandler):
    """Count and echo unary calls and stream messages."""

    def __init__(self) -> None:
        self.count = 0

    def service(
        self, details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
        """Answer /t/Unary and /t/Stream."""
        if details.method == "/t/Stream":
            return grpc.stream_stream_rpc_method_handler(self._stream)
        return grpc.unary_unary_rpc_method_handler(self._unary)

    def _unary(self, request: bytes, _: grpc.ServicerContext) -> bytes:
        self.count += 1
        return request

    def _stream(self, requests: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        for request in requests:
            self.count += 1
            yield request


@pytest.fixture
def calls() -> Iterator[tuple[Calls, str]]:
    """A gRPC server and its address."""
    from concurrent.futures import ThreadPoolExecutor

    handler = Calls()
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool, handlers=[handler])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield handler, f"127.0.0.1:{port}"
        server.stop(0).wait()


OPTIONS = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]


def unary(channel: grpc.Channel) -> "grpc.UnaryUnaryMultiCallable[bytes, bytes]":
    """Return the unary method of `Calls`."""
    return channel.unary_unary("/t/Unary")


def test_grpc_unary_reply_is_lost_after_the_handler_ran(calls: tuple[Calls, str]) -> None:
    """Exactly the third call fails, and the server did its work."""
    handler, address = calls
    codes = []
    with FaultProxy(address, dialect=GrpcDialect) as proxy:
        proxy.drop_reply_after(2)
        for _ in range(5):  # a channel each: a call right after a reset may still be put on it
            with grpc.insecure_channel(proxy.address, OPTIONS) as channel:
                call = unary(channel)
                try:
                    assert call(b"x" * 200_000, timeout=10, wait_for_ready=True) == b"x" * 200_000
                    codes.append(grpc.StatusCode.OK)
                except grpc.RpcError as error:
                    codes.append(error.code())
        assert proxy.counts["drop_reply"] == 1
    ok, lost = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE
    assert codes == [ok, ok, lost, ok, ok]
    assert handler.count == 5


def test_grpc_stream_loses_the_reply_to_the_message_named(calls: tuple[Calls, str]) -> None:
    """Two answers come, the third message is handled, its answer is lost."""
    handler, address = calls
    got: list[bytes] = []
    with FaultProxy(address, dialect=GrpcDialect) as proxy:
        proxy.drop_reply_after(2)
        with grpc.insecure_channel(proxy.address, OPTIONS) as channel:
            stream: grpc.StreamStreamMultiCallable[bytes, bytes]
            stream = channel.stream_stream("/t/Stream")
            answers = stream(iter([b"1", b"2", b"3"]), timeout=10, wait_for_ready=True)
            with pytest.raises(grpc.RpcError):
                got.extend(answers)
    assert got == [b"1", b"2"]
    assert handler.count == 3


def test_grpc_reply_can_be_held(calls: tuple[Calls, str]) -> None:
    """The call hangs after its work until the reply is released."""
    handler, address = calls
    released = threading.Event()
    with (
        FaultProxy(address, dialect=GrpcDialect) as proxy,
        grpc.insecure_channel(proxy.address, OPTIONS) as channel,
    ):
        reached = proxy.hold_reply_until(released)
        future = unary(channel).future(b"hi", timeout=10, wait_for_ready=True)
        assert reached.wait(10)
        assert handler.count == 1
        assert not future.done()
        released.set()
        assert future.result() == b"hi"


def test_the_proxy_runs_as_a_process_too(redis: str) -> None:
    """The child obeys the same commands, counts, and ends on command."""
    with ProxyProcess(redis, dialect="resp", seed=3) as proxy:
        proxy.set(Faults(drop_reply_p=1.0, only=frozenset({"FCALL"})))
        with connect(proxy) as client:
            client.sendall(command(b"GET") + command(b"FCALL"))
            assert read(client, 5) == b"+OK\r\n"
            with pytest.raises(ConnectionResetError):
                client.recv(1)
        assert proxy.counts["drop_reply"] == 1
