"""What to send and what an answer settles: the client's side of PROTOCOL.md. Sans I/O: `now` in, frames out.

Rules of this package: nothing here knows of sockets, files, clocks or asyncio. Times are seconds of one monotonic
clock. What must be written down is an action for the shell; what must be on the medium before something else is sent
is waited for (`recorded`).
"""
