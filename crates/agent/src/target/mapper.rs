//! Maps shared pages of one target QEMU from the pool of this host (SLM section III-B).
//!
//! Everything that goes wrong before or between requests ends in plain copies. Only a request whose
//! answer is not known ends the move: its pages could be mapped at any later moment, over newer ones.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use content::pool::{PoolSpace, PoolSpot, PoolUser, PoolVm, SPACE_PAGES, mapping_budget};
use cow_abi::{BLOCKS_MAX, MapRun, Outcome};
use guest::{CowError, CowLibrary, CowListener, TargetGuest, mapping_obstacle};
use page::{BlockIndex, ByteLen, ContentId, ContentKey, FrameSharing, HostAddr, PageBytes, PageNo};
use qstream::BlockList;
use sys::Process;
use wire::OpenMove;

use super::incoming::TargetContext;
use super::pool::HostPool;

/// Blocks of fewer pages are not worth a mapping: firmware and video memory. 64 MiB guests are the
/// smallest that anybody moves.
const MIN_BLOCK_PAGES: u64 = 4096;

/// Runs of fewer pages of a file get no mapping: a template's pieces between pages that were written. Of 390 runs of a guest, 160 had this
/// many pages or more, and 98.6 % of all pages.
const FILE_RUN_MIN: u32 = 4;

/// A fill page lies so many times in a row in the pool: neighbouring ones then need a mapping for
/// that many, not one each, for 256 KiB at most.
pub(crate) const FILL_ROW: u32 = 64;

/// Where fill pages lie, whoever brings them.
const FILLS: PoolSpace = PoolSpace {
    owner: 0,
    number: 0,
};

/// Tells the sockets of this agent apart.
static NEXT_SOCKET: AtomicU64 = AtomicU64::new(0);

/// Starts a QEMU, of whose process `launched` hears before its monitor answers; with it what maps its pages,
/// if they are to be shared, or why they cannot be.
pub(crate) fn start(
    (request, domain): (&OpenMove, &ContentKey),
    log: &Path,
    context: &TargetContext,
    launched: impl FnOnce(&Process, &Path),
) -> anyhow::Result<(TargetGuest, Option<Result<Mapper, String>>)> {
    let library = context.cow_library.as_deref();
    let prepare = || {
        let pool = context
            .pools
            .of(domain)
            .map_err(|error| format!("no pool of shared pages: {error}"))?;
        Waiting::prepare(&request.argv, &context.run_dir, library, &pool)
    };
    let waiting = request.share.then(prepare).transpose();
    let environment = match &waiting {
        Ok(Some(waiting)) => waiting.environment(),
        _ => &[],
    };
    let guest = TargetGuest::start_with(&request.argv, log, environment, launched)
        .context("starting the target QEMU")?;
    let mapper = match waiting {
        Ok(waiting) => waiting.map(|waiting| waiting.ready(&guest)),
        Err(why) => Some(Err(why)),
    };
    Ok((guest, mapper))
}

/// Where the library in a QEMU that is about to be started will call.
struct Waiting {
    listener: CowListener,
    pool: Arc<HostPool>,
}

impl Waiting {
    /// Prepares for a QEMU with this command line; else says why its pages cannot be shared.
    fn prepare(
        argv: &[String],
        run_dir: &Path,
        library: Option<&Path>,
        pool: &Arc<HostPool>,
    ) -> Result<Self, String> {
        if let Some(obstacle) = mapping_obstacle(argv) {
            return Err(obstacle.to_string());
        }
        let library = guest::find_cow_library(library)
            .ok_or_else(|| format!("{} is not installed here", cow_abi::LIBRARY_FILE))?;
        let number = NEXT_SOCKET.fetch_add(1, Ordering::Relaxed);
        let socket = run_dir.join(format!("c-{}-{number}.sock", std::process::id()));
        let listener = CowListener::bind(&socket, &library)
            .map_err(|error| format!("no socket for the mapping library: {error}"))?;
        let pool = Arc::clone(pool);
        Ok(Self { listener, pool })
    }

    fn environment(&self) -> &[(std::ffi::OsString, std::ffi::OsString)] {
        self.listener.environment()
    }

    /// Gets ready to map; else says why the pages of this QEMU cannot be shared.
    fn ready(self, guest: &TargetGuest) -> Result<Mapper, String> {
        let text = |error: &dyn std::error::Error| crate::host::chain(error);
        let mut library = self.listener.accept(guest.pid()).map_err(|e| text(&e))?;
        match guest.mapping_obstacle() {
            Ok(None) => {}
            Ok(Some(obstacle)) => return Err(obstacle.to_string()),
            Err(error) => return Err(text(&error)),
        }
        let blocks = guest.ram_blocks().map_err(|e| text(&e))?;
        let mut names = Vec::new();
        let mut offered = Vec::new();
        let large = |len: ByteLen| len.pages() >= MIN_BLOCK_PAGES;
        for block in blocks.iter().filter(|block| large(block.used_len)) {
            let index = u16::try_from(names.len()).map_err(|e| text(&e))?;
            if names.len() == BLOCKS_MAX {
                break;
            }
            let addr = library.add_block(index, block).map_err(|e| text(&e))?;
            names.push(block.name.clone());
            offered.push((addr, block.used_len));
        }
        library.set_pool(&self.pool.file).map_err(|e| text(&e))?;
        let vm = self.pool.join(guest.pid(), &offered);
        let vm = vm.map_err(|e| text(&e))?;
        let runs_left = mapping_budget(max_map_count(), mappings_of(guest.pid()));
        let mapper = Mapper {
            library: Some(library),
            pool: self.pool,
            vm,
            blocks: names.into_iter().zip(offered).collect(),
            numbers: Vec::new(),
            runs_left,
            runs: 0,
            last: None,
            mapped: 0,
            notes: Vec::new(),
            said: HashSet::new(),
            asked: Duration::ZERO,
        };
        Ok(mapper)
    }
}

/// Why pages are copied that could have been mapped. Their move goes on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub(crate) enum Trouble {
    #[error(
        "its pages are copied there from now on, not shared: the mapping library in its QEMU has \
         closed its connection, or its thread has ended"
    )]
    Closed,
    #[error("some of its pages are copied there, not shared: its QEMU can have no more mappings")]
    NoMappings,
    #[error("some of its pages are copied there, not shared: they could not be mapped")]
    Refused,
    #[error("some of its pages are copied there, not shared: the pool of shared pages is full")]
    PoolFull,
    #[error("some of its pages are copied there, not shared: the pool cannot be written")]
    PoolUnwritable,
}

/// A page to be mapped.
pub(crate) struct Wanted<'a> {
    pub(crate) block: BlockIndex,
    pub(crate) page: PageNo,
    pub(crate) content: ContentId,
    pub(crate) bytes: &'a PageBytes,
    /// Where it lies in the pool, if that does not depend on who brings it.
    pub(crate) spot: Option<PoolSpot>,
}

/// Maps pages of one QEMU.
pub(crate) struct Mapper {
    /// Gone when it closed, or when all memory is through.
    library: Option<CowLibrary>,
    pub(crate) pool: Arc<HostPool>,
    vm: PoolVm,
    /// Name, address and length, by their numbers in the library and the pool.
    blocks: Vec<(String, (HostAddr, ByteLen))>,
    /// By the stream's block index, the number in `blocks`.
    numbers: Vec<Option<u16>>,
    /// How many more mappings the process may get.
    runs_left: usize,
    /// How many it has got.
    runs: usize,
    /// The last run: one that goes on where it ended takes no new mapping.
    last: Option<MapRun>,
    mapped: u64,
    /// What a person should know, until it is taken; each thing once.
    notes: Vec<String>,
    said: HashSet<Trouble>,
    /// How long the library took for what it was asked.
    asked: Duration,
}

impl Mapper {
    /// The blocks in which pages can be mapped, by name, and how many pages they have.
    pub(crate) fn mappable(&self) -> HashMap<String, u32> {
        let blocks = self.blocks.iter();
        let pages = |len: &ByteLen| u32::try_from(len.pages()).ok();
        blocks
            .filter_map(|(name, (_, len))| Some((name.clone(), pages(len)?)))
            .collect()
    }

    /// Learns how the stream numbers the blocks.
    pub(crate) fn learn_blocks(&mut self, blocks: &BlockList) {
        let number = |name: &str| self.blocks.iter().position(|(known, _)| known == name);
        let numbers = blocks.iter().map(|(_, block)| number(&block.name));
        self.numbers = numbers
            .map(|number| number.and_then(|number| u16::try_from(number).ok()))
            .collect();
    }

    /// What a person should know since the last call.
    pub(crate) fn take_notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes)
    }

    fn say(&mut self, trouble: Trouble) {
        if self.said.insert(trouble) {
            self.notes.push(trouble.to_string());
        }
    }

    /// Pages that are mapped, or will be when QEMU places them.
    pub(crate) fn mapped(&self) -> u64 {
        self.mapped
    }

    /// Maps pages; says which of them are. Those that follow each other in memory take fewer mappings if they
    /// follow each other here.
    ///
    /// # Errors
    /// If it is not known whether pages are mapped, or will be: the QEMU cannot be used any more.
    pub(crate) fn map(&mut self, wanted: &[Wanted<'_>]) -> Result<Vec<bool>, CowError> {
        let mut is_mapped = vec![false; wanted.len()];
        if self.library.is_none() {
            return Ok(is_mapped);
        }
        let (chosen, left_out) = self.choose(wanted);
        let outcomes = match self.ask(&chosen, |library, maps| library.map(maps, false)) {
            Err(CowError::Closed) => {
                // It maps nothing any more, so that plain copies are safe; if its QEMU has ended,
                // they will not be taken.
                self.library = None;
                self.say(Trouble::Closed);
                vec![Outcome::Refused(0); chosen.len()]
            }
            other => other?,
        };
        for (run, outcome) in chosen.iter().zip(outcomes) {
            let pages = run.first..run.end();
            match outcome {
                Outcome::Mapped => self.mapped += u64::from(run.map.pages),
                // Its QEMU has the bytes, in memory of its own.
                Outcome::Copied => {
                    self.release(run, wanted);
                    self.say(Trouble::NoMappings);
                }
                Outcome::Refused(_) | Outcome::Expected => {
                    self.release(run, wanted);
                    if self.library.is_some() {
                        self.say(Trouble::Refused);
                    }
                    continue;
                }
            }
            is_mapped[pages].fill(true);
        }
        for run in &left_out {
            self.release(run, wanted);
        }
        Ok(is_mapped)
    }

    /// Has pages mapped when QEMU places them, in post-copy: it must know of each, so they are written
    /// to it all the same, after this. Whatever goes wrong, they are copied then.
    pub(crate) fn expect(&mut self, wanted: &[Wanted<'_>]) {
        if self.library.is_none() {
            return;
        }
        let (chosen, left_out) = self.choose(wanted);
        for run in &left_out {
            self.release(run, wanted);
        }
        let outcomes = match self.ask(&chosen, CowLibrary::expect) {
            Ok(outcomes) => outcomes,
            Err(error) => {
                // It may have heard of them: their contents stay in the pool until it is seen what
                // became of the pages.
                tracing::debug!(%error, "the mapping library does not say what it expects");
                self.library = None;
                self.say(Trouble::Closed);
                return;
            }
        };
        for (run, outcome) in chosen.iter().zip(outcomes) {
            if outcome == Outcome::Expected {
                self.mapped += u64::from(run.map.pages);
            } else {
                self.release(run, wanted);
                self.say(Trouble::Refused);
            }
        }
    }

    /// What is to be mapped, in the pool, as runs; and those that the process cannot have.
    fn choose(&mut self, wanted: &[Wanted<'_>]) -> (Vec<Run>, Vec<Run>) {
        let runs = self.runs_of(wanted);
        runs.into_iter().partition(|run| self.affords(run))
    }

    /// Places the contents in the pool, and joins neighbours.
    fn runs_of(&mut self, wanted: &[Wanted<'_>]) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for (index, page) in wanted.iter().enumerate() {
            let Some(number) = self.number(page.block) else {
                continue;
            };
            let user = self.user(number, page.page);
            let at = match self.pool.place(user, (page.spot, page.content), page.bytes) {
                Ok(Some(at)) => at,
                Ok(None) => continue,
                Err(trouble) => {
                    self.say(trouble);
                    continue;
                }
            };
            let map = MapRun {
                block: number,
                page: page.page.0,
                pages: 1,
                pool_page: at.0,
            };
            match runs.last_mut() {
                // Nothing that was left out lies between them: the run stands for all of its positions.
                Some(run) if run.end() == index && goes_on(&run.map, &map) => run.map.pages += 1,
                _ => runs.push(Run {
                    map,
                    first: index,
                    pages_min: match page.spot {
                        Some(spot) if spot.space != FILLS => FILE_RUN_MIN,
                        _ => 1,
                    },
                }),
            }
        }
        runs
    }

    /// Whether the process may get this run, which is counted then.
    fn affords(&mut self, run: &Run) -> bool {
        let takes_none = self.last.is_some_and(|last| goes_on(&last, &run.map));
        if !takes_none {
            if run.map.pages < run.pages_min {
                return false;
            }
            if self.runs_left == 0 {
                self.say(Trouble::NoMappings);
                return false;
            }
            self.runs_left -= 1;
            self.runs += 1;
        }
        self.last = Some(run.map);
        true
    }

    fn ask(
        &mut self,
        runs: &[Run],
        question: impl FnOnce(&mut CowLibrary, &[MapRun]) -> Result<Vec<Outcome>, CowError>,
    ) -> Result<Vec<Outcome>, CowError> {
        let maps: Vec<MapRun> = runs.iter().map(|run| run.map).collect();
        let Some(library) = self.library.as_mut().filter(|_| !maps.is_empty()) else {
            return Ok(Vec::new());
        };
        let begin = Instant::now();
        let answer = question(library, &maps);
        self.asked += begin.elapsed();
        answer
    }

    /// All memory is through, or no more comes: QEMU's advice about it is given again, and the library, if it
    /// is still there, is let go. What the guest writes from now on is given back to the host.
    pub(crate) fn finish(&mut self) {
        if let Some(library) = self.library.take() {
            self.close(library);
        }
        self.pool.complete(self.vm);
    }

    fn close(&self, library: CowLibrary) {
        let begin = Instant::now();
        match library.close() {
            Ok(statistics) => tracing::debug!(
                ?statistics,
                asked = ?self.asked,
                finish = ?begin.elapsed(),
                runs = self.runs,
                pages = self.mapped,
                "mapping is over"
            ),
            // What is mapped stays mapped; it may show in a core dump.
            Err(error) => tracing::warn!("the mapping library did not finish: {error}"),
        }
    }

    fn user(&self, number: u16, page: PageNo) -> PoolUser {
        PoolUser {
            vm: self.vm,
            block: BlockIndex(number),
            page,
        }
    }

    fn number(&self, block: BlockIndex) -> Option<u16> {
        self.numbers.get(usize::from(block.0)).copied().flatten()
    }

    fn release(&self, run: &Run, wanted: &[Wanted<'_>]) {
        let pages = run.first..run.end();
        for page in wanted.get(pages).unwrap_or_default() {
            self.pool.release(self.user(run.map.block, page.page));
        }
    }
}

/// Where a page is to lie in the pool, if it does not depend on who brings it.
pub(crate) fn spot(
    session: u64,
    (sharing, page): (FrameSharing, PageNo),
    fill: Option<u8>,
) -> Option<PoolSpot> {
    if let Some((file, at)) = sharing.file_page(page) {
        let (part, page) = (at / SPACE_PAGES, at % SPACE_PAGES);
        let number = u64::from(file) << 48 | part;
        let owner = session;
        let space = PoolSpace { owner, number };
        return Some(PoolSpot { space, page });
    }
    let row = u64::from(fill?) * u64::from(FILL_ROW);
    Some(PoolSpot {
        space: PoolSpace {
            owner: 0,
            number: 0,
        },
        page: row + u64::from(page.0 % FILL_ROW),
    })
}

/// Neighbours in QEMU's memory, in the pool, and in what is wanted.
struct Run {
    map: MapRun,
    /// Position of its first page in what is wanted.
    first: usize,
    /// With fewer pages it is not worth a mapping.
    pages_min: u32,
}

impl Run {
    /// Position behind its last page.
    fn end(&self) -> usize {
        self.first + self.map.pages as usize
    }
}

/// Whether `next` begins where `run` ends.
fn goes_on(run: &MapRun, next: &MapRun) -> bool {
    run.block == next.block
        && run.page.checked_add(run.pages) == Some(next.page)
        && run.pool_page.checked_add(u64::from(run.pages)) == Some(next.pool_page)
}

/// Mappings that a process may have; what the kernel takes if it does not say.
fn max_map_count() -> u64 {
    let text = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap_or_default();
    text.trim().parse().unwrap_or(65_530)
}

/// Mappings that a process has.
fn mappings_of(pid: u32) -> u64 {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    maps.lines().count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::target::pool::Pools;

    #[test]
    fn a_run_goes_on_only_if_both_its_ends_meet() {
        let run = MapRun {
            block: 0,
            page: 10,
            pages: 2,
            pool_page: 100,
        };
        let next = MapRun {
            block: 0,
            page: 12,
            pages: 1,
            pool_page: 102,
        };
        assert!(goes_on(&run, &next));
        for other in [
            MapRun { block: 1, ..next },
            MapRun { page: 13, ..next },
            MapRun {
                pool_page: 101,
                ..next
            },
        ] {
            assert!(!goes_on(&run, &other));
        }
    }

    const PAGES: u64 = 16;

    /// Of a VM of one block, whose library is gone.
    fn mapper() -> Mapper {
        let pools = Pools::start(ByteLen(1 << 20)).unwrap();
        let pool = pools.of(&ContentKey::new([1; 32])).unwrap();
        let block = (HostAddr(0), ByteLen(PAGES * 4096));
        Mapper {
            library: None,
            vm: pool.join(std::process::id(), &[block]).unwrap(),
            pool,
            blocks: vec![("ram".into(), block)],
            numbers: vec![Some(0)],
            runs_left: 100,
            runs: 0,
            last: None,
            mapped: 0,
            notes: Vec::new(),
            said: HashSet::new(),
            asked: Duration::ZERO,
        }
    }

    #[test]
    fn a_page_that_is_left_out_is_in_no_run_and_moves_none_of_the_others() {
        let mut mapper = mapper();
        let bytes = [7; 4096];
        // The second is of a block that is not mapped: contents that arrive are in no order.
        let wanted: Vec<_> = [(0, 5), (1, 9), (0, 6), (0, 7)]
            .into_iter()
            .zip(1..)
            .map(|((block, page), id)| Wanted {
                block: BlockIndex(block),
                page: PageNo(page),
                content: ContentId([id; 16]),
                bytes: &bytes,
                spot: None,
            })
            .collect();
        let runs = mapper.runs_of(&wanted);
        let placed = runs.iter().map(|run| (run.first..run.end(), run.map.page));
        assert_eq!(placed.collect::<Vec<_>>(), [(0..1, 5), (2..4, 6)]);
    }

    #[test]
    fn memory_of_a_vm_whose_library_is_gone_is_looked_after_when_all_is_through() {
        let mut mapper = mapper();
        assert!(!mapper.pool.is_complete(mapper.vm));
        mapper.finish();
        assert!(mapper.pool.is_complete(mapper.vm));
    }
}
