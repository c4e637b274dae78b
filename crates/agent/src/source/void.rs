//! The end of a post-copy that nobody needs any more.
//!
//! A source QEMU whose stream was lost in post-copy has all of its guest's memory, and if the target QEMU never ran
//! and is gone, nobody misses any of it. But QEMU neither cancels such a migration nor lets its guest run
//! beside it. So it is told to go on, into our own hands, and that everything has arrived: it completes, and
//! `cont` brings the guest back.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use guest::RamBlock;
use page::PageNo;
use qstream::{Recovery, RecoveryStep, ReturnMessage, decode_recovery, encode_return, full_bitmap};

/// How long a QEMU that goes on may be silent: it has nothing to do but to talk to us.
const SILENCE: Duration = Duration::from_secs(15);

/// The answer that says that the target is ready.
const READY: u32 = 1;

/// Answers a QEMU that goes on as a target would that lacks nothing, and reads what it still writes. Returns when
/// it has closed its stream.
pub(super) fn swallow(mut socket: UnixStream, blocks: &[RamBlock]) -> anyhow::Result<()> {
    socket.set_read_timeout(Some(SILENCE))?;
    let (mut input, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        match decode_recovery(&input).context("the source QEMU goes on otherwise than expected")? {
            RecoveryStep::NeedMore { .. } => {
                let n = socket.read(&mut piece).context("hearing the source QEMU")?;
                ensure!(n > 0, "the source QEMU closed its stream");
                input.extend_from_slice(&piece[..n]);
            }
            RecoveryStep::Command { command, consumed } => {
                let is_last = command == Recovery::Resume;
                let answer = answer(command, blocks)?;
                socket
                    .write_all(&answer)
                    .context("answering the source QEMU")?;
                input.drain(..consumed);
                if is_last {
                    break;
                }
            }
        }
    }
    loop {
        match socket.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            // It has completed, whoever closes first.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return Ok(()),
            Err(error) => {
                return Err(error).context("waiting for the source QEMU to end its stream");
            }
        }
    }
}

fn answer(command: Recovery<'_>, blocks: &[RamBlock]) -> anyhow::Result<Vec<u8>> {
    let mut out = Vec::new();
    match command {
        Recovery::Bitmap { block } => {
            let known = blocks.iter().find(|known| known.name == block);
            let known = known.ok_or_else(|| anyhow!("QEMU does not list its memory {block}"))?;
            let pages = u32::try_from(known.used_len.pages()).context("a block of memory")?;
            let bitmap = &full_bitmap(PageNo(pages));
            encode_return(&ReturnMessage::RecvBitmap { block, bitmap }, &mut out);
        }
        Recovery::Resume => {
            encode_return(&ReturnMessage::ResumeAck(READY), &mut out);
            encode_return(&ReturnMessage::Shut(0), &mut out);
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use page::ByteLen;
    use qstream::{ReturnDecoder, ReturnStep};

    fn block() -> RamBlock {
        RamBlock {
            name: "pc.ram".into(),
            used_len: ByteLen(100 * 4096),
            hva: None,
            page_size: 4096,
        }
    }

    #[test]
    fn a_qemu_that_goes_on_hears_that_nothing_is_missing() {
        let (ours, mut qemu) = UnixStream::pair().unwrap();
        let swallowing = std::thread::spawn(move || swallow(ours, &[block()]));
        qemu.write_all(b"\x08\x00\x0a\x00\x07\x06pc.ram\x08\x00\x09\x00\x00")
            .unwrap();
        qemu.write_all(b"the last section and the end").unwrap();
        qemu.shutdown(std::net::Shutdown::Write).unwrap();
        swallowing.join().unwrap().unwrap();
        let mut heard = Vec::new();
        qemu.read_to_end(&mut heard).unwrap();
        let (mut decoder, mut at) = (ReturnDecoder::new(), 0);
        let mut messages = Vec::new();
        while let Ok(ReturnStep::Message { message, raw }) = decoder.decode(&heard[at..]) {
            messages.push(format!("{message:?}"));
            at += raw.len();
        }
        assert_eq!(at, heard.len());
        // 100 pages, in whole words.
        assert_eq!(messages[0].matches("255").count(), 16);
        assert_eq!(messages[1..], ["ResumeAck(1)", "Shut(0)"]);
    }

    #[test]
    fn a_qemu_that_says_something_else_is_an_error() {
        for odd in [&b"QEVM"[..], b"\x08\x00\x0a\x00\x03\x02xy"] {
            let (ours, mut qemu) = UnixStream::pair().unwrap();
            qemu.write_all(odd).unwrap();
            assert!(swallow(ours, &[block()]).is_err(), "{odd:?}");
        }
    }
}
