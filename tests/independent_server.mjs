// A durablews.v1.json server written from PROTOCOL.md and RFC 6455 alone, for Node.js without any package.
//
//     node independent_server.mjs STATE_FILE [PORT]
//
// Prints its port. What it applied and its numbers are in STATE_FILE, written whole under another name and renamed
// before anything is acked. It cuts every one of its first connections after a number of frames that grows, with the ack
// unsent every other time.

import { createHash } from 'node:crypto';
import { closeSync, existsSync, fsyncSync, openSync, readFileSync, renameSync, writeSync } from 'node:fs';
import { createServer } from 'node:http';

const [path, port = '0'] = process.argv.slice(2);
const CUTS = 12;
const LARGEST = 65536;
const SUBPROTOCOL = 'durablews.v1.json';

const state = existsSync(path) ? JSON.parse(readFileSync(path, 'utf8')) : { seen: {}, applied: [], connections: 0 };
const newest = new Map(); // stream -> connection

function save() {
  const file = openSync(`${path}.new`, 'w');
  writeSync(file, JSON.stringify(state));
  fsyncSync(file);
  closeSync(file);
  renameSync(`${path}.new`, path);
}

// One WebSocket (RFC 6455): the frames of a client in, unmasked frames out.
class Connection {
  constructor(socket) {
    this.socket = socket;
    this.buffer = Buffer.alloc(0);
    this.parts = [];
    this.stream = null;
    this.frames = 0;
    socket.on('data', (data) => this.feed(data));
    socket.on('error', () => {});
  }

  feed(data) {
    this.buffer = Buffer.concat([this.buffer, data]);
    for (let frame = this.next(); frame !== null; frame = this.next()) this.handle(frame);
  }

  next() {
    const { buffer } = this;
    if (buffer.length < 2 || this.socket.destroyed) return null;
    let length = buffer[1] & 0x7f;
    let start = 2;
    if (length === 126) {
      if (buffer.length < 4) return null;
      length = buffer.readUInt16BE(2);
      start = 4;
    } else if (length === 127) {
      if (buffer.length < 10) return null;
      length = Number(buffer.readBigUInt64BE(2));
      start = 10;
    }
    if (!(buffer[1] & 0x80)) return this.close(1002);
    if (length > LARGEST) return this.close(1009);
    if (buffer.length < start + 4 + length) return null;
    const mask = buffer.subarray(start, start + 4);
    const payload = Buffer.from(buffer.subarray(start + 4, start + 4 + length));
    for (let i = 0; i < payload.length; i += 1) payload[i] ^= mask[i % 4];
    this.buffer = buffer.subarray(start + 4 + length);
    return { final: (buffer[0] & 0x80) !== 0, opcode: buffer[0] & 0x0f, payload };
  }

  handle({ final, opcode, payload }) {
    if (opcode === 8) {
      this.write(8, payload.subarray(0, 2));
      this.socket.end();
    } else if (opcode === 9) {
      this.write(10, payload);
    } else if (opcode === 0 || opcode === 1) {
      this.parts.push(payload);
      if (!final) return;
      const text = Buffer.concat(this.parts).toString('utf8');
      this.parts = [];
      this.receive(JSON.parse(text));
    } else if (opcode !== 10) {
      this.close(1003);
    }
  }

  write(opcode, payload) {
    const { length } = payload;
    const head = length < 126 ? Buffer.from([0x80 | opcode, length]) : Buffer.from([0x80 | opcode, 126, length >> 8, length & 0xff]);
    if (!this.socket.destroyed) this.socket.write(Buffer.concat([head, payload]));
  }

  say(frame) {
    this.write(1, Buffer.from(JSON.stringify(frame)));
  }

  close(code) {
    this.write(8, Buffer.from([code >> 8, code & 0xff]));
    this.socket.end();
    return null;
  }

  receive(frame) {
    if (this.stream === null) {
      if (frame.t !== 'hello') return this.close(4400);
      this.stream = frame.stream;
      newest.get(frame.stream)?.socket.destroy();
      newest.set(frame.stream, this);
      state.connections += 1;
      this.number = state.connections;
      return this.say({ t: 'welcome', window: 64, max_bytes: LARGEST });
    }
    if (frame.t === 'ping') return this.say({ t: 'pong', n: frame.n });
    if (frame.t !== 'msgs' || newest.get(this.stream) !== this) return null;
    this.frames += 1;
    const answer = this.take(frame);
    const cut = this.number <= CUTS && this.frames === this.number;
    if (answer !== null && !(cut && this.number % 2 === 0)) this.say(answer);
    if (cut) this.socket.resetAndDestroy();
    return null;
  }

  take({ p, a = 0, m }) {
    const key = `${this.stream} ${p}`;
    let last = state.seen[key] ?? 0;
    if (a > last) return null;
    for (const [seq, payload] of m) {
      if (seq > last) {
        state.applied.push([p, payload]);
        last = seq;
      }
    }
    state.seen[key] = last;
    save();
    return m[0][0] <= last ? { t: 'ack', p, s: last } : null;
  }
}

const server = createServer((request, response) => {
  response.writeHead(426);
  response.end();
});
server.on('upgrade', (request, socket, head) => {
  const offered = (request.headers['sec-websocket-protocol'] ?? '').split(',').map((name) => name.trim());
  const accept = createHash('sha1').update(`${request.headers['sec-websocket-key']}258EAFA5-E914-47DA-95CA-C5AB0DC85B11`);
  const lines = [
    'HTTP/1.1 101 Switching Protocols',
    'Upgrade: websocket',
    'Connection: Upgrade',
    `Sec-WebSocket-Accept: ${accept.digest('base64')}`,
  ];
  if (offered.includes(SUBPROTOCOL)) lines.push(`Sec-WebSocket-Protocol: ${SUBPROTOCOL}`);
  socket.write(`${lines.join('\r\n')}\r\n\r\n`);
  new Connection(socket).feed(head);
});
server.listen(Number(port), '127.0.0.1', () => console.log(server.address().port));
