//! The index over the network, for preparation.

use std::sync::Arc;

use page::{ContentId, ContentKey, EntryId, HostNo};
use wire::index::Item;

use super::{Connect, RegisterError, Registrar};
use crate::source::{IndexKey, IndexLink, IndexLinks, SessionContext};

/// Reaches indexes over the links that this host's moves use, too.
pub(crate) struct OverLinks {
    pub(crate) links: Arc<IndexLinks>,
    pub(crate) session: SessionContext,
}

impl Connect for OverLinks {
    fn connect(
        &self,
        group: &str,
        key: &ContentKey,
        index: &[String],
    ) -> Result<Box<dyn Registrar>, RegisterError> {
        let index = IndexKey {
            group: group.to_owned(),
            domain_key: hex::encode(key.secret()),
            shards: index.to_vec(),
        };
        let link = self.links.get(&index, key, &self.session);
        let link = link.map_err(|error| RegisterError(crate::host::chain(&error)))?;
        Ok(Box::new(OverLink(link)))
    }
}

struct OverLink(Arc<IndexLink>);

impl Registrar for OverLink {
    fn epoch(&self) -> u64 {
        self.0.epoch
    }

    fn register(
        &mut self,
        target: HostNo,
        batch: &[(ContentId, u32)],
    ) -> Result<Vec<Option<EntryId>>, RegisterError> {
        let items = batch.iter().map(|&(id, pages)| Item { id, pages });
        let entries = self.0.register(target, items.collect());
        if !batch.is_empty() && entries.iter().all(Option::is_none) {
            return Err(RegisterError("it is full or gone".to_owned()));
        }
        Ok(entries)
    }

    fn seed(
        &mut self,
        target: HostNo,
        batch: &[ContentId],
    ) -> Result<Vec<Option<EntryId>>, RegisterError> {
        let entries = self.0.seed(target, batch.to_vec());
        entries.ok_or_else(|| RegisterError("it is gone".to_owned()))
    }

    fn shared(
        &mut self,
        target: HostNo,
        batch: &[ContentId],
    ) -> Result<Vec<Option<EntryId>>, RegisterError> {
        let entries = self.0.shared(target, batch.to_vec());
        entries.ok_or_else(|| RegisterError("it is gone".to_owned()))
    }
}
