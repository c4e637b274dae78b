//! What the moves ask of a preparation.

use std::collections::BTreeMap;
use std::sync::Arc;

use guest::scan::Contents;
use page::{ContentId, EntryId, HostNo};

use super::identical::SharedAlike;

/// Which target hosts need a content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// This one only, in the whole group: nobody needs to be asked before it is sent there.
    One(HostNo),
    /// Several, or that is not known: it has this entry in the index, and must be claimed.
    Several(EntryId),
}

/// What is known of the contents of a trust domain on this host. As of the last scan: pages may
/// have been written since, and then match nothing.
#[derive(Debug)]
pub struct Prepared {
    contents: Arc<Contents>,
    /// By content; none if the index did not tell.
    needs: Vec<Option<Need>>,
    /// By target host.
    alike: BTreeMap<u16, Arc<SharedAlike>>,
}

impl Prepared {
    pub(super) fn new(
        contents: Arc<Contents>,
        needs: Vec<Option<Need>>,
        alike: BTreeMap<u16, Arc<SharedAlike>>,
    ) -> Self {
        Self {
            contents,
            needs,
            alike,
        }
    }

    /// What shares at a target host for what it holds; none if that was not asked for.
    pub(crate) fn alike(&self, target: u16) -> Option<&Arc<SharedAlike>> {
        self.alike.get(&target)
    }

    /// Who needs a content; none if preparation has not seen it.
    #[must_use]
    pub fn lookup(&self, id: ContentId) -> Option<Need> {
        let no = self.contents.find(id)?;
        self.needs.get(no.0 as usize).copied().flatten()
    }

    /// How many contents are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.needs.iter().flatten().count()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
