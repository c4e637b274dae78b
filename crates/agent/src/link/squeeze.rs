//! The compressed stream of a connection: one zstd stream, flushed at each frame.

use wire::WireCompression;
use zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd_safe::{CCtx, CParameter, DCtx, DParameter, InBuffer, OutBuffer};

/// Why bytes of a peer do not unpack, or our own do not pack.
#[derive(Debug, thiserror::Error)]
#[error("zstd: {0}")]
pub(crate) struct SqueezeError(String);

/// Logarithm of a window in which the compressor's own table finds what there is.
const SHORT_WINDOW_LOG: u8 = 22;

fn failed(code: usize) -> SqueezeError {
    SqueezeError(zstd_safe::get_error_name(code).into())
}

/// Packs the frames of a connection.
pub(crate) struct Compressor {
    context: CCtx<'static>,
}

impl Compressor {
    /// None if no compression was agreed.
    pub(crate) fn new(compression: WireCompression) -> Result<Option<Self>, SqueezeError> {
        let WireCompression::Zstd { window_log } = compression else {
            return Ok(None);
        };
        let mut context = CCtx::create();
        for parameter in [
            // The fastest level: beyond it a core is slower than a 10 Gbit/s link's share.
            CParameter::CompressionLevel(1),
            CParameter::WindowLog(window_log.into()),
            // Finds what another VM sent long ago. In a short window it takes time and finds little.
            CParameter::EnableLongDistanceMatching(window_log > SHORT_WINDOW_LOG),
        ] {
            context.set_parameter(parameter).map_err(failed)?;
        }
        Ok(Some(Self { context }))
    }

    /// Packs one frame's body, given in pieces of `raw` bytes together, into `out`.
    pub(crate) fn frame<'a>(
        &mut self,
        pieces: impl Iterator<Item = &'a [u8]>,
        raw: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), SqueezeError> {
        out.clear();
        out.reserve(zstd_safe::compress_bound(raw) + 1024);
        for piece in pieces {
            self.step(piece, out, ZSTD_EndDirective::ZSTD_e_continue)?;
        }
        self.step(&[], out, ZSTD_EndDirective::ZSTD_e_flush)
    }

    fn step(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
        directive: ZSTD_EndDirective,
    ) -> Result<(), SqueezeError> {
        let mut input = InBuffer::around(input);
        loop {
            let at = out.len();
            if out.capacity() - at < 1024 {
                out.reserve(64 << 10);
            }
            let mut output = OutBuffer::around_pos(out, at);
            let left = self
                .context
                .compress_stream2(&mut output, &mut input, directive)
                .map_err(failed)?;
            let consumed = input.pos() == input.src.len();
            let flushed = left == 0 || directive == ZSTD_EndDirective::ZSTD_e_continue;
            if consumed && flushed {
                return Ok(());
            }
        }
    }
}

/// Unpacks the frames of a connection.
pub(crate) struct Decompressor {
    context: DCtx<'static>,
}

impl Decompressor {
    /// None if no compression was agreed.
    pub(crate) fn new(compression: WireCompression) -> Result<Option<Self>, SqueezeError> {
        let WireCompression::Zstd { window_log } = compression else {
            return Ok(None);
        };
        let mut context = DCtx::create();
        // Also what bounds the memory that a hostile peer can make us take.
        let limit = u32::from(window_log.clamp(10, 27));
        context
            .set_parameter(DParameter::WindowLogMax(limit))
            .map_err(failed)?;
        Ok(Some(Self { context }))
    }

    /// Unpacks a flushed piece of the stream, which must fill `out`.
    pub(crate) fn frame(&mut self, packed: &[u8], out: &mut [u8]) -> Result<(), SqueezeError> {
        let expected = out.len();
        let mut input = InBuffer::around(packed);
        let mut output = OutBuffer::around(out);
        loop {
            let before = (input.pos(), output.pos());
            self.context
                .decompress_stream(&mut output, &mut input)
                .map_err(failed)?;
            let stuck = before == (input.pos(), output.pos());
            if output.pos() == expected && input.pos() == packed.len() {
                return Ok(());
            }
            if stuck {
                return Err(SqueezeError(format!(
                    "{} of {} bytes in, {} of {expected} out",
                    input.pos(),
                    packed.len(),
                    output.pos()
                )));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_back_one_by_one_and_a_cut_one_is_an_error() {
        let agreed = WireCompression::Zstd { window_log: 20 };
        let mut packer = Compressor::new(agreed).unwrap().unwrap();
        let mut unpacker = Decompressor::new(agreed).unwrap().unwrap();
        let mut packed = Vec::new();
        for n in 0..20_u8 {
            let pieces = [[n; 5000], [n / 2; 5000]];
            packer
                .frame(
                    pieces.iter().map(<[u8; 5000]>::as_slice),
                    10_000,
                    &mut packed,
                )
                .unwrap();
            let mut out = vec![0; 10_000];
            unpacker.frame(&packed, &mut out).unwrap();
            assert_eq!(out, pieces.concat());
        }
        packer
            .frame([[1; 100].as_slice()].into_iter(), 100, &mut packed)
            .unwrap();
        assert!(
            unpacker
                .frame(&packed[..packed.len() - 1], &mut [0; 100])
                .is_err()
        );
    }
}
