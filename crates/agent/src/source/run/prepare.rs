//! What stands before a move's stream: the VM is looked at, the session opened, the target QEMU started.

use std::sync::Arc;

use anyhow::{Context, anyhow};
use guest::{MigrationParameters, RunState, SourceGuest, target_argv};
use migrate::handover::SourceJournal;
use migrate::pack::{IdenticalPages, Packer, SharedPages};
use page::{ContentKey, FrameSharing, PAGE_SIZE};
use wire::OpenMove;

use crate::prepare::{Prepared, SharedAlike};
use crate::types::{Compression, MoveSpec, Phase, Scope, Sharing};

use super::super::home::{SHARED_MIN_PAGES, guest_memory, shares_memory};
use super::super::index_link::IndexKey;
use super::super::listening::NAMED;
use super::super::preempt;
use super::super::progress::ProgressMeter;
use super::super::reader::{self, Way};
use super::super::right_of_way::Place;
use super::super::session::{SessionKey, SessionRack, describe, spawn};
use super::super::stream::Stream;
use super::{Control, Input, Run, parameters, plain};

impl Run {
    /// Attaches to the VM, opens the session, has the target QEMU started.
    pub(super) fn prepare(&mut self) -> anyhow::Result<()> {
        let spec = self.spec.clone();
        let guest = self.home.attach(&spec.qmp, self.sender.clone())?;
        guest.check()?;
        self.home.was_running = guest.run_state()? == RunState::Running;
        if self.home.was_running && guest.loses_written_pages()? {
            let (major, minor, micro) = guest.version();
            // Each look at the written pages loses some: the rate is the true one from the start, and
            // QEMU looks as often as it does without us.
            self.approach.set_near();
            self.note(format!(
                "its QEMU {major}.{minor}.{micro} emulates the processor, and before 9.0 that loses pages which the guest \
                 writes during any live migration: pause the guest first (`stop`), or move it with \
                 QEMU 9.0 or newer"
            ));
        }
        if parameters(&spec).postcopy {
            check_postcopy(&guest)?;
        }
        self.meter = ProgressMeter::new(guest.memory_bytes().0);
        let argv = match spec.definition.clone() {
            Some(argv) => argv,
            None => {
                let replace: Vec<_> = spec
                    .replace
                    .iter()
                    .map(|r| (r.from.clone(), r.to.clone()))
                    .collect();
                target_argv(guest.argv(), &replace).context("making the target's command line")?
            }
        };
        let key = SessionKey {
            group: spec.group.clone(),
            target_bulk: spec.target_bulk.clone(),
            domain_key: spec.domain_key.clone(),
            window_log: matches!(spec.settings.compression, Compression::Zstd)
                .then_some(self.context.window_log),
            index: spec.rack.as_ref().map(|rack| rack.index.clone()),
            is_sharing: spec.settings.sharing != Sharing::Off,
        };
        let rack = self.rack_of(&spec)?;
        let session = self
            .context
            .sessions
            .get(&key, rack, &self.context.session)
            .map_err(|e| anyhow!(describe(&e)))?;
        self.control = Control::new(&spec.target_bulk, &session.id, &self.context.session);
        let memory = guest_memory(&guest).context("finding the guest's memory")?;
        // A target QEMU that maps shared pages has no huge ones: only if there is something to share.
        let has_alike = self.alike_pages() >= SHARED_MIN_PAGES;
        let share = spec.settings.sharing != Sharing::Off && (has_alike || shares_memory(&memory));
        let vm = session.number();
        let stream = Stream::new(
            vm,
            spec.vm.clone(),
            memory,
            self.context.window_bytes,
            Place::new(Arc::clone(&session.right_of_way)),
            (self.sender.clone(), self.feed),
        );
        let stream = Arc::new(stream);
        stream.bucket.set_rate(spec.max_bandwidth_bytes_per_s);
        session.add(&stream);
        self.session = Some(session);
        self.stream = Some(stream);
        self.home.settings = Some(guest.save_settings(&parameters(&spec))?);
        self.write_journal(SourceJournal::Begun)?;
        let memory_bytes = guest.memory_bytes().0;
        let resume = self.home.was_running;
        let postcopy = parameters(&spec).postcopy;
        // Pages that are to be mapped are announced one after the other, and on one channel.
        let preempt = postcopy && spec.postcopy_preempt && !share && guest.preempt()?.is_some();
        let open = OpenMove {
            id: spec.id.clone(),
            vm_name: spec.vm.clone(),
            vm,
            argv,
            resume,
            memory_bytes,
            share,
            postcopy,
            preempt,
        };
        let opened = self.control.open(open);
        let (note, preempts) =
            opened.map_err(|e| anyhow!("the target cannot receive it: {}", plain(&e)))?;
        self.preempts = preempts;
        if let Some(message) = note {
            self.note(message);
        }
        Ok(())
    }

    /// Has QEMU migrate into our hands, and its stream read.
    pub(super) fn start_stream(&mut self) -> anyhow::Result<()> {
        let (Some(stream), Some(session)) = (&self.stream, &self.session) else {
            return Err(anyhow!("the move was not prepared"));
        };
        let socket_name = format!("{NAMED}{}-{}.sock", stream.vm, &session.id[..8]);
        let path = self.context.run_dir.join(socket_name);
        let parameters = MigrationParameters {
            preempt: self.preempts,
            ..parameters(&self.spec)
        };
        let (socket, listening) = self.home.migrate(&path, &parameters)?;
        stream.attach(socket.try_clone()?);
        if self.preempts {
            stream.set_preempts();
            let (stream, outbox) = (Arc::clone(stream), Arc::clone(&session.outbox));
            spawn("gw-preempt", move || {
                if let Err(error) = preempt::run(listening, &stream, &outbox) {
                    stream.tell(Input::Failed(error.to_string()));
                }
            })?;
        }
        let packer = self.packer(stream)?;
        let way = Way {
            outbox: Arc::clone(&session.outbox),
            rack: session.rack.clone(),
            prepared: self.prepared(),
        };
        let (stream, hold) = (Arc::clone(stream), self.context.session.hold.clone());
        spawn("gw-read", move || {
            if let Err(error) = reader::run(&socket, &stream, &way, packer, &hold) {
                stream.tell(Input::Failed(error.to_string()));
                reader::drain_if_asked(&socket, &stream);
            }
        })?;
        self.enter(Phase::Bulk, "memory is being copied".into());
        Ok(())
    }

    /// The move's place in its group; none if the index cannot be reached, which costs bytes.
    fn rack_of(&self, spec: &MoveSpec) -> anyhow::Result<Option<SessionRack>> {
        let Some(rack) = &spec.rack else {
            return Ok(None);
        };
        let secret = content_key(&spec.domain_key)?;
        let key = IndexKey {
            group: spec.group.clone(),
            domain_key: spec.domain_key.clone(),
            shards: rack.index.clone(),
        };
        let indexes = &self.context.indexes;
        match indexes.get(&key, &secret, &self.context.session) {
            Ok(index) => Ok(Some(SessionRack::new(rack, &spec.group, &secret, index))),
            Err(error) => {
                let message = format!(
                    "contents are shared on this host pair only: {}",
                    plain(&error)
                );
                self.note(message);
                Ok(None)
            }
        }
    }

    /// What the VMs that go where this one goes share for what they hold.
    fn alike(&self) -> Option<Arc<SharedAlike>> {
        if self.spec.settings.sharing != Sharing::Identical {
            return None;
        }
        let secret = content_key(&self.spec.domain_key).ok()?;
        let preparations = &self.context.preparations;
        preparations.alike(&self.spec.group, secret.secret(), &self.spec.vm)
    }

    /// How many pages of this VM that are; says so if it is not known.
    fn alike_pages(&self) -> u64 {
        let alike = self.alike();
        if alike.is_none() && self.spec.settings.sharing == Sharing::Identical {
            self.note(
                "what it has in common with other VMs was not looked for: it shares at the target what \
                 it shares here"
                    .to_owned(),
            );
        }
        let of_vm = alike.as_ref().and_then(|one| one.vms.get(&self.spec.vm));
        of_vm.map_or(0, |of_vm| of_vm.pages)
    }

    /// What turns the VM's stream into operations.
    pub(super) fn packer(&self, stream: &Stream) -> anyhow::Result<Packer> {
        let settings = self.spec.settings;
        let key = match (settings.scope, settings.sharing) {
            (Scope::None, Sharing::Off) => None,
            _ => Some(content_key(&self.spec.domain_key)?),
        };
        let mut packer = Packer::new(key, stream.memory.addresses.keys().cloned().collect());
        if settings.scope == Scope::None {
            packer = packer.shared_only();
        }
        if let Some(alike) = self.alike() {
            let (memory, names) = &stream.memory.layout;
            let blocks = names.iter().zip(&memory.blocks);
            let blocks = blocks.map(|(name, block)| (name.as_str(), block.pages));
            let mut left_out = SharedPages::of_blocks(blocks);
            let of_vm = alike.vms.get(&self.spec.vm);
            for (block, page) in of_vm.into_iter().flat_map(|of_vm| &of_vm.left_out) {
                left_out.mark(usize::from(*block), *page, FrameSharing::Merged);
            }
            let contents = Arc::clone(&alike.contents);
            packer = packer.share_identical(IdenticalPages::new(contents, left_out));
        }
        Ok(packer)
    }

    /// What a preparation of the group has found here.
    pub(super) fn prepared(&self) -> Option<Arc<Prepared>> {
        if self
            .spec
            .rack
            .as_ref()
            .is_some_and(|rack| rack.shared_target)
        {
            // Needed by this target only may still mean by two source hosts.
            return None;
        }
        let secret = content_key(&self.spec.domain_key).ok()?;
        let preparations = &self.context.preparations;
        preparations.prepared(&self.spec.group, secret.secret())
    }
}

/// A page of the host is placed at once, and pages are sent ahead one by one.
fn check_postcopy(guest: &SourceGuest) -> anyhow::Result<()> {
    let blocks = guest.ram_blocks()?;
    match blocks
        .iter()
        .find(|block| block.page_size != PAGE_SIZE as u64)
    {
        Some(block) => Err(anyhow!(
            "post-copy of memory with large pages ({}) is not carried yet",
            block.name
        )),
        None => Ok(()),
    }
}

pub(super) fn content_key(hex_digits: &str) -> anyhow::Result<ContentKey> {
    let mut secret = [0; 32];
    hex::decode_to_slice(hex_digits, &mut secret)
        .context("the trust domain's secret is not 64 hex digits")?;
    Ok(ContentKey::new(secret))
}
