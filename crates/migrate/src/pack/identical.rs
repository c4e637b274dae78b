//! Which pages are to share at the target because of what they hold, whatever they share at the source.

use std::sync::Arc;

use content::Identical;
use page::{ContentId, PageNo};

use super::SharedPages;

/// What is wanted of one VM. A hint like all that is said of sharing: the content of each page in the
/// stream decides, so that a page that was written since shares only if it still has such a content.
#[derive(Clone, Debug)]
pub struct IdenticalPages {
    contents: Arc<Identical>,
    /// Pages that do not share all the same: the VM can have no more mappings.
    left_out: Arc<SharedPages>,
    /// By block index, the block's position in `left_out`.
    left_out_at: Vec<Option<usize>>,
}

impl IdenticalPages {
    /// Pages with these contents, without those that are marked in `left_out`.
    #[must_use]
    pub fn new(contents: Arc<Identical>, left_out: SharedPages) -> Self {
        Self {
            contents,
            left_out: Arc::new(left_out),
            left_out_at: Vec::new(),
        }
    }

    /// Learns how the stream numbers the blocks.
    pub(super) fn learn_blocks<'a>(&mut self, names: impl Iterator<Item = &'a str>) {
        let position = |name: &str| self.left_out.position_of(name);
        self.left_out_at = names.map(position).collect();
    }

    /// Whether a page may share for what it holds.
    pub(super) fn may_share(&self, block: usize, page: PageNo) -> bool {
        let at = self.left_out_at.get(block).copied().flatten();
        at.is_none_or(|at| !self.left_out.sharing(at, page).is_shared())
    }

    pub(super) fn has(&self, id: ContentId) -> bool {
        self.contents.has(id)
    }

    pub(super) fn has_fill(&self, byte: u8) -> bool {
        self.contents.has_fill(byte)
    }
}
