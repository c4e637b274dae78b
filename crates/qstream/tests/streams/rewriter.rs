//! Both agents in one, without anything between them. The fuzz targets use it as well.

use std::sync::Arc;

use qstream::{Decoder, Encoder, Item, encode_command};

/// Re-encodes a decoded stream as the two agents together do.
#[derive(Default)]
pub(crate) struct Rewriter {
    pub(crate) out: Vec<u8>,
    encoder: Option<Encoder>,
}

impl Rewriter {
    pub(crate) fn item(&mut self, item: &Item<'_>, decoder: &Decoder) {
        let out = &mut self.out;
        match *item {
            Item::RamStart { raw } => {
                out.extend_from_slice(raw);
                self.encoder = Some(Encoder::new(
                    Arc::clone(decoder.blocks().expect("RAM has started")),
                    decoder.ram_section_id().expect("RAM has started"),
                    decoder.footers().expect("RAM has started"),
                ));
            }
            Item::Header { raw, .. }
            | Item::Opaque(raw)
            | Item::Tail(raw)
            | Item::Discard { raw, .. }
            | Item::Package(raw) => {
                out.extend_from_slice(raw);
            }
            Item::PackageBegin { raw, .. } => {
                self.encoder.as_mut().expect("RAM has started").name_again();
                out.extend_from_slice(raw);
            }
            Item::Command { command, .. } => encode_command(command, out),
            _ => {
                let encoder = self.encoder.as_mut().expect("RAM has started");
                match *item {
                    Item::PartBegin => encoder.begin_part(out),
                    Item::EndBegin => encoder.begin_end(out),
                    Item::Page { block, page, bytes } => {
                        encoder.page(block, page, out);
                        out.extend_from_slice(bytes);
                    }
                    Item::Zero { block, page } => encoder.zero(block, page, out),
                    _ => encoder.close(out),
                }
            }
        }
    }
}
