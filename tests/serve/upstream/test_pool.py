"""Which server gets a request."""

from dataclasses import dataclass

from keural.serve.upstream.pool import BLOCK, REMEMBERED, SLACK, Affinity


@dataclass(eq=False)
class Server:
    running: int = 0
    asked: int = 0


def test_what_was_read_stays_where_it_was_read() -> None:
    pool, first, second = Affinity(), Server(), Server(asked=1)
    prompt = list(range(3 * BLOCK))
    assert pool.choose(prompt, [first, second]) is first
    first.running = SLACK - 1

    assert pool.choose([*prompt, 7], [first, second]) is first
    assert pool.choose(prompt[: 2 * BLOCK] + [9] * BLOCK, [first, second]) is first, "a part of it was read, too"
    assert pool.choose([9] * BLOCK, [first, second]) is second


def test_a_beginning_is_not_worth_any_wait() -> None:
    pool, first, second = Affinity(), Server(), Server(asked=1)
    prompt = [5] * BLOCK
    assert pool.choose(prompt, [first, second]) is first
    first.running = SLACK

    assert pool.choose(prompt, [first, second]) is second
    second.running = SLACK + 1
    assert pool.choose(prompt, [first, second]) is second, "it has read it now"


def test_a_reader_that_is_gone_is_not_missed() -> None:
    pool, first, second = Affinity(), Server(), Server(running=3)
    assert pool.choose([5] * BLOCK, [first]) is first
    assert pool.choose([5] * BLOCK, [second]) is second


def test_servers_with_the_same_to_do_take_turns() -> None:
    pool, servers = Affinity(), [Server(), Server()]
    for number in range(6):
        pool.choose([number], servers).asked += 1
    assert [server.asked for server in servers] == [3, 3]


def test_not_everything_is_remembered() -> None:
    pool, server = Affinity(), Server()
    for number in range(REMEMBERED // 100):
        pool.choose([number] * (BLOCK * 128), [server])
    assert len(pool._readers) == REMEMBERED
