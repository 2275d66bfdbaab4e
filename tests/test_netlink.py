"""Which of the kernel's messages are news, and that no bytes can hurt who reads them."""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from durablews.netlink import NetworkNews

# As in <linux/netlink.h>, <linux/rtnetlink.h> and <linux/if_addr.h>, written down a second time.
ERROR, DONE = 2, 3
NEWLINK, DELLINK, GETLINK = 16, 17, 18
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
MULTI, REPLACE = 0x2, 0x100
INET, INET6, BRIDGE, MPLS = 2, 10, 7, 28
UP, LOWER_UP, RUNNING = 0x1, 0x10000, 0x40
GLOBAL, SITE, LINK, HOST = 0, 200, 253, 254
UNICAST, LOCAL, BLACKHOLE, UNREACHABLE = 1, 2, 6, 7
MAIN, LOCAL_TABLE, COMPAT = 254, 255, 252
SECONDARY = TEMPORARY = 0x01
DADFAILED, TENTATIVE, PERMANENT, MANAGED = 0x08, 0x40, 0x80, 0x100
CLONED = 0x200


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def attribute(kind: int, value: bytes) -> bytes:
    return padded(struct.pack("=HH", 4 + len(value), kind) + value)


def number(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def packed(text: str) -> bytes:
    return ipaddress.ip_address(text).packed if text else b""


def family_of(text: str) -> int:
    return INET6 if ":" in text else INET


def message(kind: int, body: bytes = b"", *, flags: int = 0, sequence: int = 0) -> bytes:
    return padded(struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body)


def address(
    text: str, *, interface: int = 2, scope: int = GLOBAL, flags: int = 0, gone: bool = False, more: bytes = b""
) -> bytes:
    """Announce an address as the kernel does: IPv4 says both ends, IPv6 the prefix' only."""
    body = struct.pack("=BBBBI", family_of(text), 24, flags & 0xFF, scope, interface) + attribute(1, packed(text))
    body += attribute(2, packed(text)) if family_of(text) == INET else b""
    return message(DELADDR if gone else NEWADDR, body + attribute(3, b"eth0\0") + number(8, flags) + more)


def route(
    gateway: str = "10.0.0.254",
    *,
    interface: int = 2,
    metric: int = 100,
    length: int = 0,
    table: int = MAIN,
    kind: int = UNICAST,
    family: int | None = None,
    tos: int = 0,
    flags: int = 0,
    replaces: bool = False,
    gone: bool = False,
    more: bytes = b"",
) -> bytes:
    """Announce a route with one next hop, or with the attributes of `more` alone where there is no gateway."""
    family = family_of(gateway) if family is None else family
    body = struct.pack("=BBBBBBBBI", family, length, 0, tos, min(table, COMPAT), 3, 0, kind, flags)
    if table in (MAIN, LOCAL_TABLE):
        body = body[:4] + bytes([table]) + body[5:]
    body += number(15, table) + number(6, metric)
    if gateway:
        body += attribute(5, packed(gateway)) + number(4, interface)
    return message(DELROUTE if gone else NEWROUTE, body + more, flags=REPLACE if replaces else 0)


def hops(*ways: tuple[int, str]) -> bytes:
    """Return the attribute of a route with several next hops: interface and gateway of each."""
    found = b""
    for interface, gateway in ways:
        inner = attribute(5, packed(gateway))
        found += struct.pack("=HBBi", 8 + len(inner), 0, 0, interface) + inner
    return attribute(9, found)


def link(flags: int, *, interface: int = 2, family: int = 0, gone: bool = False) -> bytes:
    body = struct.pack("=BBHiII", family, 0, 1, interface, flags, 0xFFFFFFFF) + attribute(3, b"eth0\0")
    return message(DELLINK if gone else NEWLINK, body)


def done(sequence: int) -> bytes:
    return message(DONE, bytes(4), flags=MULTI, sequence=sequence)


def marked(data: bytes, sequence: int) -> bytes:
    """Return messages as the parts of an answer."""
    parts, offset = bytearray(data), 0
    while offset < len(parts):
        struct.pack_into("=HI", parts, offset + 6, MULTI, sequence)
        offset += int.from_bytes(parts[offset : offset + 4], sys.byteorder)
    return bytes(parts)


def emptied(news: NetworkNews) -> NetworkNews:
    """Answer all questions, those of a new loss too, with nothing."""
    news.lost()
    for sequence in range(10):
        news.feed(done(sequence))
        news.ask()
    return news


CARRIES = UP | LOWER_UP | RUNNING
UNPLUGGED = UP

EVERYTHING = [
    link(CARRIES),
    address("192.0.2.1"),
    address("2001:db8::1"),
    route("192.0.2.254"),
    route("fe80::1"),
    route("", family=INET6, more=hops((2, "fe80::2"), (3, "fe80::3"))),
    address("192.0.2.1", gone=True),
    route("fe80::1", gone=True),
    link(UNPLUGGED),
]


# -- addresses


@pytest.mark.parametrize("text", ["192.0.2.1", "10.1.2.3", "2001:db8::1", "fd00::1"])
def test_an_address_is_news_once(text: str) -> None:
    """An address that was not there is news; what a router or a lease repeats of it never is."""
    news = NetworkNews()
    assert news.feed(address(text))
    for flags in (0, PERMANENT, MANAGED):
        assert not news.feed(address(text, flags=flags))


@pytest.mark.parametrize("text", ["192.0.2.1", "2001:db8::1"])
def test_an_address_that_was_gone_is_news_again(text: str) -> None:
    """A network that went and came back is worth a try, however often it does."""
    news = NetworkNews()
    for _ in range(3):
        assert news.feed(address(text))
        assert not news.feed(address(text, gone=True))


def test_the_same_address_on_another_interface_is_another() -> None:
    """A machine that changes from cable to radio may keep its address."""
    news = NetworkNews()
    assert news.feed(address("192.0.2.1", interface=2))
    assert news.feed(address("192.0.2.1", interface=3))
    assert not news.feed(address("192.0.2.1", interface=2, gone=True))
    assert not news.feed(address("192.0.2.1", interface=3))


@pytest.mark.parametrize(
    ("text", "scope", "flags"),
    [
        ("127.0.0.1", HOST, 0),
        ("::1", HOST, 0),
        ("192.0.2.1", LINK, 0),
        ("169.254.7.7", GLOBAL, 0),
        ("fe80::1", LINK, 0),
        ("febf::1", GLOBAL, 0),
        ("2001:db8::1", GLOBAL, TENTATIVE),
        ("2001:db8::1", GLOBAL, DADFAILED),
        ("2001:db8::1", GLOBAL, TEMPORARY),
    ],
)
def test_an_address_that_reaches_nowhere_or_is_not_ours_yet_is_no_news(text: str, scope: int, flags: int) -> None:
    """Loopback, link-local, tentative and temporary ones; nor is it ever news that they go."""
    news = NetworkNews()
    assert not news.feed(address(text, scope=scope, flags=flags))
    assert not news.feed(address(text, scope=scope, flags=flags, gone=True))


@pytest.mark.parametrize(("text", "scope"), [("fec0::1", SITE), ("169.253.7.7", GLOBAL), ("fdff::1", GLOBAL)])
def test_neighbours_of_what_is_ignored_are_news(text: str, scope: int) -> None:
    """No more is ignored than has to be."""
    assert NetworkNews().feed(address(text, scope=scope))


def test_a_second_address_of_ipv4_is_news() -> None:
    """Its mark is the bit that marks IPv6's temporary ones."""
    assert NetworkNews().feed(address("192.0.2.2", flags=SECONDARY))


def test_a_tentative_address_is_news_when_it_is_settled() -> None:
    """And when it becomes tentative again, as after a carrier's loss, it is news once more when it has settled."""
    news = NetworkNews()
    for _ in range(2):
        assert not news.feed(address("2001:db8::1", flags=TENTATIVE | PERMANENT))
        assert news.feed(address("2001:db8::1", flags=PERMANENT))
        assert not news.feed(address("2001:db8::1", flags=PERMANENT))


def test_the_long_flags_count_more_than_the_short_ones() -> None:
    """IFA_FLAGS replaces the byte of the header, which an old kernel gives alone."""
    body = struct.pack("=BBBBI", INET6, 64, TENTATIVE, GLOBAL, 2) + attribute(1, packed("2001:db8::1"))
    assert not NetworkNews().feed(message(NEWADDR, body))
    assert NetworkNews().feed(message(NEWADDR, body + number(8, PERMANENT)))
    body = body[:2] + b"\0" + body[3:]
    assert not NetworkNews().feed(message(NEWADDR, body + number(8, TENTATIVE)))


def test_between_two_points_the_near_end_is_the_address() -> None:
    """IFA_ADDRESS is then the other side's: with another address of our own it is other news."""

    def between(ours: str, theirs: str) -> bytes:
        body = struct.pack("=BBBBI", INET, 32, 0, GLOBAL, 7)
        return message(NEWADDR, body + attribute(1, packed(theirs)) + attribute(2, packed(ours)))

    news = NetworkNews()
    assert news.feed(between("10.64.0.7", "10.64.64.64"))
    assert not news.feed(between("10.64.0.7", "10.64.64.64"))
    assert news.feed(between("10.64.0.8", "10.64.64.64"))


# -- default routes


@pytest.mark.parametrize("gateway", ["10.0.0.254", "fe80::1"])
def test_a_default_route_is_news_once_until_it_goes(gateway: str) -> None:
    """As an address is."""
    news = NetworkNews()
    for _ in range(2):
        assert news.feed(route(gateway))
        assert not news.feed(route(gateway))
        assert not news.feed(route(gateway, gone=True))


def test_a_default_route_is_known_by_its_way_out() -> None:
    """Another gateway, interface, metric, kind of service or source is another route."""
    news = NetworkNews()
    assert news.feed(route())
    assert news.feed(route("10.0.0.253"))
    assert news.feed(route(interface=3))
    assert news.feed(route(metric=600))
    assert news.feed(route(tos=8))
    assert news.feed(route("", interface=9, more=number(4, 9)))
    for last in "12":
        via = attribute(18, struct.pack("=H", INET6) + packed(f"fe80::{last}"))
        assert news.feed(route("", family=INET, more=number(4, 2) + via))
    assert news.feed(route("fe80::1"))
    assert news.feed(route("fe80::1", more=attribute(2, packed("2001:db8::"))))
    for again in (route(), route("10.0.0.253"), route(interface=3), route(metric=600), route(tos=8), route("fe80::1")):
        assert not news.feed(again)


@pytest.mark.parametrize(
    "other",
    [
        route(length=24),
        route(length=1),
        route(table=LOCAL_TABLE),
        route(table=51820),
        route(kind=LOCAL),
        route(kind=BLACKHOLE),
        route("fe80::1", kind=UNREACHABLE),
        route("fe80::1", flags=CLONED),
        route(family=MPLS),
    ],
)
def test_another_route_is_no_news(other: bytes) -> None:
    """Only what leads anywhere counts: the default route, in the main table."""
    assert not NetworkNews().feed(other)


def test_the_long_number_of_a_table_counts_more_than_the_short_one() -> None:
    """RTA_TABLE replaces the byte of the header."""
    body = struct.pack("=BBBBBBBBI", INET, 0, 0, 0, MAIN, 3, 0, UNICAST, 0) + number(4, 2)
    assert NetworkNews().feed(message(NEWROUTE, body))
    assert not NetworkNews().feed(message(NEWROUTE, body + number(15, 1000)))
    body = body[:4] + bytes([COMPAT]) + body[5:]
    assert not NetworkNews().feed(message(NEWROUTE, body))
    assert NetworkNews().feed(message(NEWROUTE, body + number(15, MAIN)))


def test_each_next_hop_of_a_route_is_a_way_out() -> None:
    """The kernel tells of a further hop with all of them, and of its end with that one alone."""
    news = NetworkNews()
    one, two = (2, "fe80::2"), (3, "fe80::3")
    assert news.feed(route("fe80::2", interface=2))
    assert news.feed(route("", family=INET6, more=hops(one, two)))
    assert not news.feed(route("", family=INET6, more=hops(two, one)))
    assert not news.feed(route("fe80::3", interface=3, gone=True))
    assert not news.feed(route("fe80::2", interface=2))
    assert news.feed(route("", family=INET6, more=hops(one, two)))
    assert not news.feed(route("", family=INET6, more=hops(one, two), gone=True))
    assert news.feed(route("fe80::2", interface=2))


def test_a_route_that_was_replaced_is_news_when_it_returns() -> None:
    """The kernel does not say that it is gone. One of another metric was not replaced."""
    news = NetworkNews()
    assert news.feed(route("10.0.0.1", metric=100))
    assert news.feed(route("10.0.0.1", metric=600))
    assert news.feed(route("10.0.0.2", metric=100, replaces=True))
    assert not news.feed(route("10.0.0.2", metric=100, replaces=True))
    assert news.feed(route("10.0.0.1", metric=100, replaces=True))
    assert not news.feed(route("10.0.0.1", metric=600))
    assert not news.feed(route("fe80::9", length=64, replaces=True))


# -- links


@pytest.mark.parametrize("gateway", ["10.0.0.254", "fe80::1"])
def test_a_route_is_forgotten_when_its_link_is_switched_off(gateway: str) -> None:
    """IPv4's goes with it and nobody says so; the other links' stay."""
    news = NetworkNews()
    assert news.feed(route(gateway))
    assert news.feed(route(gateway, interface=3))
    assert not news.feed(link(0))
    assert not news.feed(link(CARRIES))
    assert news.feed(route(gateway))
    assert not news.feed(route(gateway, interface=3))


def test_a_link_with_a_default_route_that_carries_again_is_news() -> None:
    """The cable is back in: addresses and routes were there all the time, and nothing else is said."""
    news = NetworkNews()
    assert news.feed(address("192.0.2.1"))
    assert news.feed(route())
    for _ in range(2):
        assert not news.feed(link(UNPLUGGED))
        assert not news.feed(link(UNPLUGGED | LOWER_UP)), "a Wi-Fi card that is not let in yet"
        assert not news.feed(address("192.0.2.1"))
        assert not news.feed(route())
        assert news.feed(link(CARRIES))
        assert not news.feed(link(CARRIES))


def test_a_link_without_a_default_route_may_come_and_go() -> None:
    """A bridge of containers carries again at each of their starts, with the address that it had."""
    news = NetworkNews()
    assert news.feed(route(interface=2))
    assert news.feed(address("172.17.0.1", interface=5))
    for flags in (UNPLUGGED, CARRIES, 0, CARRIES):
        assert not news.feed(link(flags, interface=5))


def test_what_is_on_a_link_that_is_removed_is_forgotten() -> None:
    """With its addresses, and only those; a bridge's port that leaves the bridge is no removed link."""
    news = NetworkNews()
    for interface in (2, 3):
        assert news.feed(address("192.0.2.1", interface=interface))
        assert news.feed(route(interface=interface))
    assert not news.feed(link(CARRIES, family=BRIDGE, gone=True))
    assert not news.feed(link(0, family=BRIDGE))
    assert not news.feed(address("192.0.2.1") + route())
    assert not news.feed(link(0, gone=True))
    assert news.feed(address("192.0.2.1"))
    assert news.feed(route())
    assert not news.feed(address("192.0.2.1", interface=3) + route(interface=3))


# -- what goes without a word


def test_the_routes_of_ipv4_go_with_the_last_address() -> None:
    """The kernel removes them in silence; while another address is left they stay, as IPv6's do."""
    news = NetworkNews()
    for text in ("192.0.2.1", "192.0.2.2", "2001:db8::1"):
        assert news.feed(address(text))
    for gateway in ("10.0.0.254", "fe80::1"):
        assert news.feed(route(gateway))
    assert not news.feed(address("192.0.2.1", gone=True))
    assert not news.feed(route("10.0.0.254"))
    assert not news.feed(address("192.0.2.2", gone=True))
    assert news.feed(route("10.0.0.254"))
    assert not news.feed(address("2001:db8::1", gone=True))
    assert not news.feed(route("fe80::1"))


def test_a_route_of_ipv4_goes_with_the_source_that_it_prefers() -> None:
    """Kernels before 6.6 say nothing then either; a route on which the address is no matter stays."""
    news = NetworkNews()
    preferring = route("10.0.0.253", more=attribute(7, packed("192.0.2.1")))
    for data in (address("192.0.2.1"), address("192.0.2.2"), preferring, route("10.0.0.254")):
        assert news.feed(data)
    assert not news.feed(address("192.0.2.1", gone=True))
    assert not news.feed(route("10.0.0.254"))
    assert news.feed(preferring)


# -- datagrams


def test_every_message_of_a_datagram_counts() -> None:
    """News is news wherever it stands, and what follows it is learnt too."""
    news = NetworkNews()
    before, after = message(99, b"what is this?"), message(NEWADDR, b"too short")
    assert news.feed(before + address("192.0.2.1") + after + route() + address("192.0.2.1", gone=True))
    assert news.feed(address("192.0.2.1"))
    assert not news.feed(address("192.0.2.1") + address("192.0.2.1"))
    assert news.feed(address("192.0.2.1", gone=True) + address("192.0.2.1"))


def test_what_was_there_at_the_start_is_no_news() -> None:
    """Links, addresses and routes are asked for, one question at a time, and the answers are learnt in silence."""
    news = NetworkNews()
    answers = {
        GETLINK: link(UNPLUGGED),
        GETADDR: address("192.0.2.1") + address("2001:db8::1"),
        GETROUTE: route() + route("fe80::1"),
    }
    asked = []
    while (question := news.ask()) is not None:
        length, kind, flags, sequence, port = struct.unpack_from("=IHHII", question)
        assert (length, flags, port) == (len(question), 0x301, 0)
        asked.append(kind)
        assert news.ask() is None, "two questions at once"
        assert not news.feed(marked(answers[kind], sequence))
        assert news.ask() is None
        assert not news.feed(done(sequence + 1))
        assert news.ask() is None, "the answer to another question ended this one"
        assert not news.feed(done(sequence))
    assert asked == [GETLINK, GETADDR, GETROUTE]
    for data in answers.values():
        assert not news.feed(data)
    assert news.feed(link(CARRIES))
    assert news.feed(address("192.0.2.2"))


def test_a_refused_question_is_not_asked_again() -> None:
    """An error is an answer: the next question follows, and there is an end."""
    news = NetworkNews()
    for _ in range(3):
        question = news.ask()
        assert question is not None
        (sequence,) = struct.unpack_from("=I", question, 8)
        assert not news.feed(message(ERROR, struct.pack("=i", -95) + question[:16], sequence=sequence))
    assert news.ask() is None


def test_after_a_loss_everything_is_asked_for_again() -> None:
    """What was missed may have been anything. The answer that is under way is waited for first."""
    news = NetworkNews()
    first = news.ask()
    assert first is not None
    news.lost()
    assert news.ask() is None, "two questions at once"
    news.feed(done(struct.unpack_from("=I", first, 8)[0]))
    kinds = []
    while (question := news.ask()) is not None:
        _, kind, _, sequence, _ = struct.unpack_from("=IHHII", question)
        kinds.append(kind)
        news.feed(done(sequence))
    assert kinds == [GETLINK, GETADDR, GETROUTE]


def test_after_a_loss_only_what_is_answered_is_known() -> None:
    """What was put by before the loss is given after it, and is old; what comes beside the answers is not."""
    news = emptied(NetworkNews())
    assert news.feed(address("192.0.2.1"))
    news.lost()
    assert news.feed(address("192.0.2.2"))
    question = news.ask()
    assert question is not None
    (sequence,) = struct.unpack_from("=I", question, 8)
    assert news.feed(address("192.0.2.3"))
    assert not news.feed(marked(link(CARRIES), sequence) + done(sequence))
    assert news.ask() is not None
    assert not news.feed(marked(address("192.0.2.4"), sequence + 1) + done(sequence + 1))
    for text in ("192.0.2.1", "192.0.2.2"):
        assert news.feed(address(text))
    for text in ("192.0.2.3", "192.0.2.4"):
        assert not news.feed(address(text))


def test_no_more_is_remembered_than_there_is_room_for() -> None:
    """A thousand and twenty-four, of which those go first that were announced longest ago."""
    news = NetworkNews()
    many = [address(str(ipaddress.ip_address(0x0A000000 + number))) for number in range(1025)]
    for data in many[:1024]:
        assert news.feed(data)
    assert not news.feed(many[0])
    assert news.feed(many[1024])
    assert not news.feed(many[0])
    assert not news.feed(many[2])
    assert news.feed(many[1])


# -- bytes that make no sense


def test_a_datagram_that_ends_early_is_read_as_far_as_it_goes() -> None:
    """Cut anywhere, nothing raises, and each message before the cut is learnt."""
    data = b"".join(EVERYTHING)
    ends = [len(b"".join(EVERYTHING[:count])) for count in range(len(EVERYTHING) + 1)]
    for cut in range(len(data) + 1):
        news = NetworkNews()
        assert news.feed(data[:cut]) == (cut >= ends[2]), "the first address"
        if cut >= ends[-1]:
            assert news.feed(address("192.0.2.1"))


@pytest.mark.parametrize("length", [0, 1, 15, 17, 4096, 0xFFFFFFFF])
def test_a_length_that_cannot_be_ends_the_datagram(length: int) -> None:
    """Shorter than its own head or longer than what is there: no endless loop, no error."""
    data = struct.pack("=I", length) + address("192.0.2.1")[4:]
    assert not NetworkNews().feed(data)
    assert NetworkNews().feed(address("192.0.2.2") + data)


@pytest.mark.parametrize("kind", [0, 1, 2, 4, 5, 6, 7, 8, 9, 15, 18])
@pytest.mark.parametrize("length", range(12))
def test_an_attribute_of_any_length_is_borne(kind: int, length: int) -> None:
    """Also of one that no kernel gives it: what cannot be understood is as good as absent."""
    odd = attribute(kind, b"\xff" * length)
    for data in (
        address("192.0.2.1", more=odd),
        address("2001:db8::1", more=odd),
        route(more=odd),
        route("", more=odd),
    ):
        news = NetworkNews()
        news.feed(data)
        assert emptied(news).feed(address("192.0.2.1"))


def test_the_marks_of_an_attribute_are_no_part_of_its_kind() -> None:
    """The two highest bits say how it is packed (NLA_F_NESTED), which some kernels say and some do not."""
    news = NetworkNews()
    assert news.feed(route("", family=INET, more=hops((2, "10.0.0.1"), (3, "10.0.0.2"))))
    nested = bytearray(hops((2, "10.0.0.1"), (3, "10.0.0.2")))
    struct.pack_into("=H", nested, 2, 9 | 0x8000)
    assert not news.feed(route("", family=INET, more=bytes(nested)))


@given(st.binary(max_size=300))
def test_no_bytes_raise(data: bytes) -> None:
    """Whatever a datagram holds, it is read to its end, and the next good one is understood."""
    news = NetworkNews()
    news.feed(data)
    assert emptied(news).feed(address("192.0.2.1"))


@given(
    st.lists(
        st.builds(
            message,
            st.sampled_from([ERROR, DONE, 4, NEWLINK, DELLINK, NEWADDR, DELADDR, NEWROUTE, DELROUTE]),
            st.binary(max_size=60),
            flags=st.integers(0, 0xFFFF),
            sequence=st.integers(0, 3),
        ),
        max_size=8,
    )
)
def test_no_bytes_inside_a_message_raise(messages: list[bytes]) -> None:
    """Nor do bodies that are anything."""
    news = NetworkNews()
    news.ask()
    news.feed(b"".join(messages))
    assert emptied(news).feed(address("192.0.2.1"))


@given(st.data())
def test_no_damage_to_a_true_message_raises(data: st.DataObject) -> None:
    """What the kernel says, with some bytes of it changed."""
    original = bytearray(b"".join(EVERYTHING))
    places = data.draw(st.dictionaries(st.integers(0, len(original) - 1), st.integers(0, 255), max_size=12))
    for place, value in places.items():
        original[place] = value
    news = NetworkNews()
    news.feed(bytes(original))
    assert emptied(news).feed(address("192.0.2.1"))


@given(st.lists(st.tuples(st.sampled_from(["192.0.2.1", "192.0.2.2", "2001:db8::1"]), st.booleans()), max_size=40))
def test_an_address_is_news_exactly_when_it_was_not_there(said: list[tuple[str, bool]]) -> None:
    """In any order of coming and going, repeated or not."""
    news, there = NetworkNews(), set()
    for text, gone in said:
        assert news.feed(address(text, gone=gone)) == (not gone and text not in there)
        (there.discard if gone else there.add)(text)


def test_the_numbers_are_the_systems() -> None:
    """Where Python knows Linux' address families they are those that are used here."""
    if sys.platform == "linux":
        assert (INET, INET6) == (socket.AF_INET, socket.AF_INET6)
