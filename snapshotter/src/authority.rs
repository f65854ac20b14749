//! Callers whose `:authority` is no authority.
//!
//! gRPC's C core, which programs in C++ and Python use, writes the path of a Unix socket there with `%2F` for each slash. The HTTP
//! library below tonic resets such a call as malformed. Nobody here reads the authority, so on the way in its percent signs
//! become dots; lengths stay, and so do all other bytes.

use std::collections::VecDeque;
use std::io::{self, Read as _};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tonic::transport::server::{Connected, UdsConnectInfo};

/// Bytes with which a client opens a connection, before its first frame.
const PREFACE: usize = 24;

/// Bytes before a frame's payload: 3 of length, type, flags, 4 of stream.
const HEAD: usize = 9;

/// Longest payload, in bytes, that a client may send unless it is told otherwise, which our server never does.
const LONGEST: usize = 1 << 14;

/// The frame type HEADERS, and its flags that put bytes before the header block.
const HEADERS: u8 = 1;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// Place of `:authority` in the static table of headers (RFC 7541, appendix A).
const AUTHORITY: usize = 1;

/// A connection from any gRPC client.
#[derive(Debug)]
pub struct Connection {
    inner: UnixStream,
    frames: Frames,
    mended: VecDeque<u8>,
}

impl Connection {
    /// Serves the caller behind `inner`.
    pub fn new(inner: UnixStream) -> Self {
        Self { inner, frames: Frames::default(), mended: VecDeque::new() }
    }
}

impl Connected for Connection {
    type ConnectInfo = UdsConnectInfo;

    fn connect_info(&self) -> UdsConnectInfo {
        self.inner.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.mended.is_empty() {
            let mut space = [0; 4096];
            let mut space = ReadBuf::new(&mut space);
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut space))?;
            if space.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.frames.mend(space.filled(), &mut this.mended);
        }
        let read = this.mended.read(buf.initialize_unfilled())?;
        buf.advance(read);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

/// What has been seen of a client's frames.
#[derive(Debug)]
struct Frames {
    /// Bytes that go by unread.
    pass: usize,
    /// A frame's head, or a HEADERS frame, that has not come whole.
    held: Vec<u8>,
}

impl Default for Frames {
    fn default() -> Self {
        Self { pass: PREFACE, held: Vec::new() }
    }
}

impl Frames {
    /// Moves `read` to `mended`, but for the start of a frame whose rest has to come first.
    fn mend(&mut self, mut read: &[u8], mended: &mut VecDeque<u8>) {
        while !read.is_empty() {
            if self.pass > 0 {
                mended.extend(take(&mut read, &mut self.pass));
                continue;
            }
            let mut missing = self.whole() - self.held.len();
            self.held.extend(take(&mut read, &mut missing));
            if self.held.len() < self.whole() {
                continue;
            }
            if self.held[3] == HEADERS {
                let flags = self.held[4];
                mend_headers(flags, &mut self.held[HEAD..]);
            }
            self.pass = HEAD + self.payload() - self.held.len();
            mended.extend(self.held.drain(..));
        }
    }

    /// Bytes of the frame's payload, once its head is there.
    fn payload(&self) -> usize {
        self.held[..3].iter().fold(0, |length, &byte| length << 8 | usize::from(byte))
    }

    /// Bytes to hold before they can go on.
    fn whole(&self) -> usize {
        // A longer frame ends the connection anyway.
        let headers = self.held.len() >= HEAD && self.held[3] == HEADERS && self.payload() <= LONGEST;
        if headers { HEAD + self.payload() } else { HEAD }
    }
}

/// Takes as many bytes as there are, but no more than are `wanted`.
fn take<'a>(read: &mut &'a [u8], wanted: &mut usize) -> &'a [u8] {
    let (taken, rest) = read.split_at(read.len().min(*wanted));
    *read = rest;
    *wanted -= taken.len();
    taken
}

/// Mends a HEADERS frame's payload. What cannot be followed is left to those who decode it.
fn mend_headers(flags: u8, payload: &mut [u8]) {
    let before = usize::from(flags & PADDED != 0) + if flags & PRIORITY != 0 { 5 } else { 0 };
    let mut at = before;
    while let Some(header) = Header::find(payload, at) {
        if let Some(value) = header.authority {
            for byte in &mut payload[value] {
                if *byte == b'%' {
                    *byte = b'.';
                }
            }
        }
        at = header.end;
    }
}

/// One entry of a header block (RFC 7541, section 6).
struct Header {
    /// Where the value lies if this is `:authority`, written out and not in Huffman's code.
    authority: Option<std::ops::Range<usize>>,
    /// Where the next entry begins.
    end: usize,
}

impl Header {
    fn find(block: &[u8], at: usize) -> Option<Self> {
        let first = *block.get(at)?;
        let prefix = match first {
            0x80.. => 7,
            0x40.. => 6,
            0x20.. => 5,
            _ => 4,
        };
        let (index, at) = integer(block, at, prefix)?;
        if prefix == 7 || prefix == 5 {
            return Some(Self { authority: None, end: at });
        }
        let (named, at) = match index {
            0 => {
                let name = Text::find(block, at)?;
                (!name.huffman && block[name.range.clone()] == *b":authority", name.range.end)
            }
            index => (index == AUTHORITY, at),
        };
        let value = Text::find(block, at)?;
        let end = value.range.end;
        Some(Self { authority: (named && !value.huffman).then_some(value.range), end })
    }
}

/// A string of a header block (RFC 7541, section 5.2).
struct Text {
    huffman: bool,
    range: std::ops::Range<usize>,
}

impl Text {
    fn find(block: &[u8], at: usize) -> Option<Self> {
        let huffman = block.get(at)? & 0x80 != 0;
        let (length, start) = integer(block, at, 7)?;
        let end = start.checked_add(length).filter(|&end| end <= block.len())?;
        Some(Self { huffman, range: start..end })
    }
}

/// The integer in the low `prefix` bits at `at` and after them, and where it ends (RFC 7541, section 5.1).
fn integer(block: &[u8], mut at: usize, prefix: u32) -> Option<(usize, usize)> {
    let most = (1 << prefix) - 1;
    let mut value = usize::from(*block.get(at)?) & most;
    at += 1;
    if value < most {
        return Some((value, at));
    }
    // Nothing in a frame is longer than three such bytes say.
    for shift in [0, 7, 14] {
        let byte = usize::from(*block.get(at)?);
        at += 1;
        value += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some((value, at));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::{Frames, HEADERS, LONGEST, PADDED, PREFACE, PRIORITY};

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).expect("a short payload");
        [&length.to_be_bytes()[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    fn mend(pieces: impl IntoIterator<Item = Vec<u8>>) -> Vec<u8> {
        let (mut frames, mut mended) = (Frames::default(), VecDeque::new());
        for piece in pieces {
            frames.mend(&piece, &mut mended);
        }
        mended.into()
    }

    fn opened(frames: &[u8]) -> Vec<u8> {
        [&[b'%'; PREFACE], frames].concat()
    }

    /// `:path` by name, `:authority` as `start` writes its name, `:method POST` by index and a header that has a percent sign.
    fn block(start: &[u8], authority: &[u8]) -> Vec<u8> {
        [
            &b"\x40\x05:path\x02/%"[..],
            start,
            &[u8::try_from(authority.len()).expect("short")],
            authority,
            b"\x83\x00\x01x\x01%",
        ]
        .concat()
    }

    #[test]
    fn percent_signs_of_an_authority_become_dots_and_nothing_else_changes() {
        for start in [&b"\x40\x0a:authority"[..], b"\x41", b"\x01", b"\x11"] {
            for (flags, before) in [(4, &b""[..]), (4 | PADDED, b"\x00"), (4 | PRIORITY, b"%%%%\x10")] {
                let sent = [before, &block(start, b"run%2Fs.sock")].concat();
                let got = [before, &block(start, b"run.2Fs.sock")].concat();
                let (sent, got) = (opened(&frame(HEADERS, flags, &sent)), opened(&frame(HEADERS, flags, &got)));
                assert_eq!(mend([sent]), got, "{start:?} with flags {flags}");
            }
        }
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(cuts in proptest::collection::vec(1_usize..40, 1..60)) {
            let sent: Vec<u8> = [
                opened(&frame(4, 0, &[b'%'; 12])),
                frame(HEADERS, 4, &block(b"\x41", b"a%2Fb")),
                frame(0, 1, &[b'%'; 300]),
                frame(HEADERS, 4, &block(b"\x41", b"c%2Fd")),
            ]
            .concat();
            let mut rest = &sent[..];
            let pieces: Vec<Vec<u8>> = cuts
                .iter()
                .map(|&cut| {
                    let (piece, after) = rest.split_at(cut.min(rest.len()));
                    rest = after;
                    piece.to_vec()
                })
                .collect();
            let tail = rest.to_vec();
            prop_assert_eq!(mend(pieces.into_iter().chain([tail])), mend([sent]));
        }

        #[test]
        fn whatever_a_frame_holds_is_passed_on_in_its_length(
            kind in 0_u8..10, flags: u8, payload in proptest::collection::vec(any::<u8>(), 0..200)
        ) {
            let sent = opened(&frame(kind, flags, &payload));
            let got = mend([sent.clone()]);
            prop_assert_eq!(got.len(), sent.len());
            if kind != HEADERS {
                prop_assert_eq!(got, sent);
            }
        }
    }

    #[test]
    fn a_frame_longer_than_any_may_be_is_not_kept() {
        let sent = opened(&frame(HEADERS, 4, &vec![0; LONGEST + 1]));
        assert_eq!(mend([sent[..PREFACE + 100].to_vec()]).len(), PREFACE + 100);
    }
}
