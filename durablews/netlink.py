"""What Linux says of its network over a netlink socket, and whether the network got better. Pure.

Layouts and numbers: netlink(7), rtnetlink(7), netdevice(7), <linux/rtnetlink.h> and <linux/if_addr.h>. Everything is in
the machine's own byte order, and starts at a multiple of four bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

__all__ = ["NetworkNews"]

# So many addresses, default routes and idle links are remembered; a router of a data centre has more.
_MEMORY = 1024

# Each of these begins with its own length.
_MESSAGE = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr: length, type
_NEXT_HOP = struct.Struct("=HBBi")  # struct rtnexthop: length, flags, hops, interface

_LINK = struct.Struct("=BBHiII")  # struct ifinfomsg: family, -, type, interface, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # struct ifaddrmsg: family, prefix length, flags, scope, interface
_ROUTE = struct.Struct("=BBBBBBBBI")  # struct rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_NUMBER = struct.Struct("=I")

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK = 16, 17, 18
_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 20, 21, 22
_RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE = 24, 25, 26
_NLM_F_REQUEST, _NLM_F_MULTI, _NLM_F_REPLACE, _NLM_F_DUMP = 0x1, 0x2, 0x100, 0x300
_ATTRIBUTE_TYPE = 0x3FFF  # NLA_TYPE_MASK: the two highest bits are flags

_AF_UNSPEC, _AF_INET, _AF_INET6 = 0, 2, 10
_ADDRESS_LENGTHS = {_AF_INET: 4, _AF_INET6: 16}

_IFF_UP, _IFF_RUNNING = 0x1, 0x40

_RT_SCOPE_LINK = 253  # from here on it means this link, this host, nowhere
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFA_F_TEMPORARY, _IFA_F_DADFAILED, _IFA_F_TENTATIVE = 0x01, 0x08, 0x40

_RTN_UNICAST, _RT_TABLE_MAIN, _RTM_F_CLONED = 1, 254, 0x200
_RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC = 2, 4, 5, 6, 7
_RTA_MULTIPATH, _RTA_TABLE, _RTA_VIA = 9, 15, 18

# What is asked for, in this order, and the length of the question's body.
_QUESTIONS = [(_RTM_GETLINK, _LINK.size), (_RTM_GETADDR, _ADDRESS.size), (_RTM_GETROUTE, _ROUTE.size)]


class _Address(NamedTuple):
    """An address that reaches further than its link."""

    family: int
    interface: int
    address: bytes


class _Route(NamedTuple):
    """One way out of a default route; a route with several next hops is several of these."""

    family: int
    interface: int
    tos: int
    metric: int
    source: bytes
    gateway: bytes


class _Idle(NamedTuple):
    """A link that carries nothing: switched off, unplugged, or not let in yet."""

    interface: int


class NetworkNews:
    """Tells what is new from what the kernel says again and again.

    It repeats an address at each router advertisement and each renewal of a lease. To try again at each of those would
    undo the backoff of a whole fleet, so only three things are news: an address that was not there, a default route
    that was not there, and a link with a default route that carries again.

    No address is: one that reaches no further than its link (127.0.0.1, fe80::, RFC 3927's 169.254.), one that another
    host may turn out to have (RFC 4862, tentative), and RFC 8981's temporary ones, which come by the day beside one
    that stays. Routes count in the main table only.

    What is there at the start is no news: send what `ask` returns, one question after the other, and feed the answers.
    Only what the kernel says again before it has answered is: it cannot be told from what has just come.
    """

    def __init__(self) -> None:
        # Least recently announced first; a route's value is the address that it prefers as its source.
        self._known: dict[_Address | _Route | _Idle, bytes] = {}
        self._sequence = 0
        self._asking = False
        self.lost()

    def lost(self) -> None:
        """Take note that messages have been lost: whatever is known may be wrong, and is to be asked for again."""
        self._questions = list(_QUESTIONS)

    def ask(self) -> bytes | None:
        """Return what to send to the kernel now, if anything: it answers one such question at a time.

        Ask when there is nothing left to read. After a loss the kernel first gives what it had put by, which what was
        lost may have overtaken, and drops more without a word until that is read (its af_netlink.c).
        """
        if self._asking or not self._questions:
            return None
        if len(self._questions) == len(_QUESTIONS):
            self._known.clear()
        self._asking = True
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        kind, length = self._questions.pop(0)
        flags = _NLM_F_REQUEST | _NLM_F_DUMP
        return _MESSAGE.pack(_MESSAGE.size + length, kind, flags, self._sequence, 0) + bytes(length)

    def feed(self, data: bytes) -> bool:
        """Take one datagram, and return whether it says that the network got better. Bytes that make no sense end it.

        Answers to `ask` are learnt, and are no news.
        """
        better = False
        for (_, kind, flags, sequence, _), body in _pieces(data, _MESSAGE):
            if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                if sequence == self._sequence:
                    self._asking = False
            # The parts of an answer are marked as parts; what the kernel says unasked never is.
            elif self._learn(kind, flags, body) and not flags & _NLM_F_MULTI:
                better = True
        return better

    def _learn(self, kind: int, flags: int, body: bytes) -> bool:
        if kind in (_RTM_NEWLINK, _RTM_DELLINK):
            return self._link(body, gone=kind == _RTM_DELLINK)
        if kind in (_RTM_NEWADDR, _RTM_DELADDR):
            return self._address(body, gone=kind == _RTM_DELADDR)
        if kind in (_RTM_NEWROUTE, _RTM_DELROUTE):
            return self._route(body, gone=kind == _RTM_DELROUTE, replaces=bool(flags & _NLM_F_REPLACE))
        return False

    def _link(self, body: bytes, *, gone: bool) -> bool:
        if len(body) < _LINK.size:
            return False
        family, _, _, interface, flags, _ = _LINK.unpack_from(body)
        if family != _AF_UNSPEC:  # a bridge speaks of its ports in the same words: one that leaves it is not gone
            return False
        if gone:
            for known in [known for known in self._known if known.interface == interface]:
                del self._known[known]
            return False
        if not flags & _IFF_UP:
            # IPv4's routes go without a word when their link is switched off, and IPv6's where the system is set so
            # (skip_notify_on_dev_down in the kernel's ip-sysctl.rst). Remembered, they could not be news again.
            for route in self._routes(interface):
                del self._known[route]
        # RUNNING, not LOWER_UP: a Wi-Fi card has its carrier before it is let in (the kernel's operstates.rst).
        if not flags & _IFF_RUNNING:
            self._remember(_Idle(interface))
            return False
        was_idle = self._known.pop(_Idle(interface), None) is not None
        # Other links come and go on their own account: each container that starts lets a bridge carry again.
        return was_idle and bool(self._routes(interface))

    def _address(self, body: bytes, *, gone: bool) -> bool:
        if len(body) < _ADDRESS.size:
            return False
        family, _, flags, scope, interface = _ADDRESS.unpack_from(body)
        attributes = _attributes(body[_ADDRESS.size :])
        # Between two points IFA_ADDRESS is the other end's; IPv6 leaves IFA_LOCAL away elsewhere (<linux/if_addr.h>).
        address = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS, b"")
        if len(address) != _ADDRESS_LENGTHS.get(family):
            return False
        known = _Address(family, interface, address)
        flags = _number(attributes, _IFA_FLAGS, flags)
        if not gone and scope < _RT_SCOPE_LINK and not _link_local(address) and _settled(family, flags):
            return self._remember(known)
        self._known.pop(known, None)
        if gone and family == _AF_INET:
            self._forget_routes_of(known)
        return False

    def _forget_routes_of(self, address: _Address) -> None:
        """Forget the routes that IPv4 removes with an address: those that prefer it, and with the last one all."""
        last = not any(isinstance(known, _Address) and known[:2] == address[:2] for known in self._known)
        for route in self._routes(address.interface):
            if route.family == _AF_INET and (last or self._known[route] == address.address):
                del self._known[route]

    def _route(self, body: bytes, *, gone: bool, replaces: bool) -> bool:
        routes, source = _default_routes(body)
        if gone:
            for route in routes:
                self._known.pop(route, None)
            return False
        better = False
        for route in routes:
            better |= self._remember(route, source)
        if replaces and routes:
            # Of the route whose place this one takes no more is said.
            place = (routes[0].family, routes[0].tos, routes[0].metric, routes[0].source)
            for known in [known for known in self._known if isinstance(known, _Route) and known not in routes]:
                if (known.family, known.tos, known.metric, known.source) == place:
                    del self._known[known]
        return better

    def _routes(self, interface: int) -> list[_Route]:
        return [known for known in self._known if isinstance(known, _Route) and known.interface == interface]

    def _remember(self, what: _Address | _Route | _Idle, source: bytes = b"") -> bool:
        """Remember it as announced last, and return whether it is new."""
        new = self._known.pop(what, None) is None
        self._known[what] = source
        if len(self._known) > _MEMORY:
            del self._known[next(iter(self._known))]
        return new


def _pieces(data: bytes, header: struct.Struct) -> Iterator[tuple[tuple[Any, ...], bytes]]:
    """Yield the head and the body of each piece of `data`, up to the first that does not fit."""
    offset = 0
    while len(data) - offset >= header.size:
        head = header.unpack_from(data, offset)
        length = head[0]
        if not header.size <= length <= len(data) - offset:
            return
        yield head, data[offset + header.size : offset + length]
        offset += (length + 3) & ~3


def _attributes(data: bytes) -> dict[int, bytes]:
    return {kind & _ATTRIBUTE_TYPE: value for (_, kind), value in _pieces(data, _ATTRIBUTE)}


def _number(attributes: dict[int, bytes], kind: int, otherwise: int) -> int:
    value = attributes.get(kind, b"")
    return int(_NUMBER.unpack(value)[0]) if len(value) == _NUMBER.size else otherwise


def _link_local(address: bytes) -> bool:
    """Say whether an address is of fe80::/10 (RFC 4291) or of 169.254/16 (RFC 3927), whatever scope it was given."""
    if len(address) == 4:
        return address[:2] == b"\xa9\xfe"
    return address[0] == 0xFE and address[1] & 0xC0 == 0x80


def _settled(family: int, flags: int) -> bool:
    """Say whether an address is ours alone for sure, and is to stay. IPv4 marks secondary ones with TEMPORARY's bit."""
    unsettled = _IFA_F_TENTATIVE | _IFA_F_DADFAILED
    return not flags & (unsettled | _IFA_F_TEMPORARY if family == _AF_INET6 else unsettled)


def _default_routes(body: bytes) -> tuple[list[_Route], bytes]:
    """Return the ways out that a message speaks of, and the source address that they prefer; none if it is another's.

    A source in the route itself (RTA_SRC) restricts who may use it; OpenWrt has such default routes for IPv6.
    """
    if len(body) < _ROUTE.size:
        return [], b""
    family, length, _, tos, table, _, _, kind, flags = _ROUTE.unpack_from(body)
    if length or kind != _RTN_UNICAST or flags & _RTM_F_CLONED or family not in _ADDRESS_LENGTHS:
        return [], b""
    attributes = _attributes(body[_ROUTE.size :])
    if _number(attributes, _RTA_TABLE, table) != _RT_TABLE_MAIN:
        return [], b""
    hops = [(_number(attributes, _RTA_OIF, 0), attributes)]
    if _RTA_MULTIPATH in attributes:
        pieces = _pieces(attributes[_RTA_MULTIPATH], _NEXT_HOP)
        hops = [(interface, _attributes(more)) for (_, _, _, interface), more in pieces]
    metric, source = _number(attributes, _RTA_PRIORITY, 0), attributes.get(_RTA_SRC, b"")
    routes = [
        _Route(family, interface, tos, metric, source, hop.get(_RTA_GATEWAY) or hop.get(_RTA_VIA, b""))
        for interface, hop in hops
    ]
    return routes, attributes.get(_RTA_PREFSRC, b"")
