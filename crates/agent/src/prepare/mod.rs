//! Preparation of a migration on a source host (IRLM section 2.4): hashes the memory of a group's
//! VMs, registers what it finds with the rack's index, and remembers which contents other target
//! hosts need, too.
//!
//! ```text
//!  coordinator            this agent                                index
//!    │ POST prepare           │                                       │
//!    ├───────────────────────►│ scan, idle priority                   │
//!    │ GET (until registered) │ register(target, contents) ──────────►│
//!    │◄──────────────────────►│                                       │
//!    │ ... all hosts have registered ...                              │
//!    │ POST resolve           │ needed elsewhere? ───────────────────►│
//!    ├───────────────────────►│ (survey: compress what would be sent) │
//!    │ GET (until ready)      │                                       │
//!    │◄──────────────────────►│ Prepared: looked up by the moves      │
//! ```
//!
//! Two steps, because a content is known to be needed by one target host only after every host
//! has registered. Whatever fails here costs bytes in the migration, never the migration.
//!
//! Memory: 16 bytes a page of guest memory and, for each distinct content, at most
//! [`guest::scan::CONTENT_BYTES_MAX`] and [`KNOWLEDGE_BYTES`] more. It is freed when the group
//! ends, or when nobody has asked for it for [`LEASE`].

mod connection;
mod identical;
mod job;
mod prepared;
mod registrar;
mod report;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use guest::scan::ScanProgress;

pub(crate) use connection::OverLinks;
pub(crate) use identical::SharedAlike;
pub use prepared::{Need, Prepared};
pub use registrar::{Connect, RegisterError, Registrar};
pub(crate) use report::ids_of;

use crate::api::mover::{Refusal, RefusalCode};
use crate::target::RackStores;
use crate::types::{HostSurvey, PrepareSpec, PrepareState, PrepareStatus, ResolveSpec};
use job::Domain;

/// Results that nobody asks for are forgotten after an hour: time for a person to start the
/// migration that was prepared.
pub const LEASE: Duration = Duration::from_secs(3600);

/// Preparations held at once: each holds memory in proportion to its guests'.
const PREPARATIONS_MAX: usize = 16;

/// Entry, need and registration of a distinct content.
pub const KNOWLEDGE_BYTES: usize = 32;

/// Secret of a trust domain.
pub(crate) type Secret = [u8; 32];

/// The preparations of this host.
pub struct Preparations {
    host: String,
    window_log: u8,
    index: Option<Arc<dyn Connect>>,
    /// Where contents of VMs that stay here are kept for those that come.
    stores: Option<Arc<RackStores>>,
    table: Mutex<HashMap<String, Arc<Preparation>>>,
}

/// The preparation of one group.
pub(crate) struct Preparation {
    spec: PrepareSpec,
    cancelled: AtomicBool,
    pages_total: AtomicU64,
    progress: ScanProgress,
    inner: Mutex<Inner>,
}

struct Inner {
    state: PrepareState,
    message: String,
    report: Option<HostSurvey>,
    /// Absent while a thread works on them.
    domains: Option<BTreeMap<Secret, Domain>>,
    prepared: HashMap<Secret, Arc<Prepared>>,
    used: Instant,
}

impl Preparations {
    /// None yet. Without an `index` nothing is registered, and only with a single target host is
    /// known who needs what.
    #[must_use]
    pub fn new(host: &str, window_log: u8, index: Option<Arc<dyn Connect>>) -> Self {
        Self {
            host: host.to_owned(),
            window_log,
            index,
            stores: None,
            table: Mutex::default(),
        }
    }

    /// With the stores of the VMs that come to this host.
    pub(crate) fn with_stores(self, stores: Arc<RackStores>) -> Self {
        Self {
            stores: Some(stores),
            ..self
        }
    }

    /// Starts the first step; again, if the group was prepared before.
    ///
    /// # Errors
    /// If it is under way, if the spec makes no sense, or if too many are held.
    pub fn start(&self, spec: PrepareSpec) -> Result<(), Refusal> {
        let keys = job::keys_of(&spec)?;
        let mut table = lock(&self.table);
        self.forget_expired(&mut table);
        let known = table.get(&spec.key()).cloned();
        if known.is_none() && table.len() >= PREPARATIONS_MAX {
            let message = format!("this agent holds {PREPARATIONS_MAX} preparations, its most");
            return Err(Refusal::new(RefusalCode::Busy, message));
        }
        let domains = match known {
            None => BTreeMap::new(),
            Some(known) => known.take_domains()?,
        };
        let key = spec.key();
        let preparation = Arc::new(Preparation::new(spec, domains));
        table.insert(key, Arc::clone(&preparation));
        drop(table);
        let (host, index) = (self.host.clone(), self.index.clone());
        let stores = self.stores.clone();
        preparation.spawn("prepare", move |one, domains| {
            let with = job::With {
                host: &host,
                index: index.as_deref(),
                stores: stores.as_deref(),
            };
            job::scan(one, domains, keys, &with)
        })
    }

    /// Starts the second step.
    ///
    /// # Errors
    /// If there is no preparation of the group, or its first step has not ended well.
    pub fn resolve(&self, group: &str, spec: ResolveSpec) -> Result<(), Refusal> {
        let preparation = self.find(group)?;
        preparation.begin_resolving()?;
        let (window_log, index) = (self.window_log, self.index.clone());
        preparation.spawn("resolve", move |one, domains| {
            job::resolve(one, domains, &spec, window_log, index.as_deref())
        })
    }

    /// Where a preparation stands.
    ///
    /// # Errors
    /// If there is none of the group.
    pub fn status(&self, group: &str) -> Result<PrepareStatus, Refusal> {
        Ok(self.find(group)?.status())
    }

    /// Ends a preparation and forgets its results.
    ///
    /// # Errors
    /// If there is none of the group.
    pub fn end(&self, group: &str) -> Result<(), Refusal> {
        let preparation = self.find(group)?;
        preparation.cancelled.store(true, Ordering::Relaxed);
        lock(&self.table).remove(group);
        self.forget_seeds(&preparation);
        Ok(())
    }

    fn forget_expired(&self, table: &mut HashMap<String, Arc<Preparation>>) {
        table.retain(|_, one| {
            let is_expired = one.is_expired();
            if is_expired {
                self.forget_seeds(one);
            }
            !is_expired
        });
    }

    fn forget_seeds(&self, preparation: &Preparation) {
        if let Some(stores) = self.stores.as_ref().filter(|_| preparation.spec.resident) {
            stores.forget_seeds(&preparation.spec.key());
        }
    }

    /// What is known of the contents of a group's trust domain; none unless it is ready.
    #[must_use]
    pub fn prepared(&self, group: &str, secret: &[u8; 32]) -> Option<Arc<Prepared>> {
        let preparation = self.find(group).ok()?;
        let mut inner = lock(&preparation.inner);
        inner.used = Instant::now();
        inner.prepared.get(secret).cloned()
    }

    /// What shares for what it holds where a VM of the group goes; none unless that is ready.
    pub(crate) fn alike(&self, group: &str, secret: &Secret, vm: &str) -> Option<Arc<SharedAlike>> {
        let prepared = self.prepared(group, secret)?;
        let preparation = self.find(group).ok()?;
        let vm = preparation.spec.vms.iter().find(|one| one.vm == vm)?;
        let alike = prepared.alike(vm.target)?;
        alike.vms.contains_key(&vm.vm).then(|| Arc::clone(alike))
    }

    fn find(&self, group: &str) -> Result<Arc<Preparation>, Refusal> {
        let mut table = lock(&self.table);
        self.forget_expired(&mut table);
        table.get(group).cloned().ok_or_else(|| {
            let message = format!("nothing is prepared here for group `{group}`");
            Refusal::new(RefusalCode::UnknownGroup, message)
        })
    }
}

impl Preparation {
    fn new(spec: PrepareSpec, domains: BTreeMap<Secret, Domain>) -> Self {
        Self {
            spec,
            cancelled: AtomicBool::new(false),
            pages_total: AtomicU64::new(0),
            progress: ScanProgress::default(),
            inner: Mutex::new(Inner {
                state: PrepareState::Scanning,
                message: "memory is being hashed".to_owned(),
                report: None,
                domains: Some(domains),
                prepared: HashMap::new(),
                used: Instant::now(),
            }),
        }
    }

    /// Takes what is remembered out of an earlier preparation.
    fn take_domains(&self) -> Result<BTreeMap<Secret, Domain>, Refusal> {
        let mut inner = lock(&self.inner);
        if !inner.state.is_settled() {
            return Err(busy(&self.spec.group));
        }
        Ok(inner.domains.take().unwrap_or_default())
    }

    fn begin_resolving(&self) -> Result<(), Refusal> {
        let mut inner = lock(&self.inner);
        match inner.state {
            PrepareState::Registered | PrepareState::Ready => {}
            PrepareState::Failed => {
                let message = format!("the preparation failed: {}", inner.message);
                return Err(Refusal::new(RefusalCode::TooLate, message));
            }
            PrepareState::Scanning | PrepareState::Resolving => return Err(busy(&self.spec.group)),
        }
        inner.state = PrepareState::Resolving;
        Ok(())
    }

    fn is_expired(&self) -> bool {
        let inner = lock(&self.inner);
        inner.state.is_settled() && inner.used.elapsed() > LEASE
    }

    fn status(&self) -> PrepareStatus {
        let mut inner = lock(&self.inner);
        inner.used = Instant::now();
        let settled = inner.state.is_settled();
        PrepareStatus {
            group: self.spec.group.clone(),
            state: inner.state,
            message: inner.message.clone(),
            pages_total: self.pages_total.load(Ordering::Relaxed),
            pages_done: self.progress.pages(),
            report: inner.report.clone().filter(|_| settled),
        }
    }

    /// Does a step on a thread of its own.
    fn spawn(
        self: &Arc<Self>,
        name: &str,
        step: impl FnOnce(&Self, &mut BTreeMap<Secret, Domain>) -> Result<Outcome, job::JobError>
        + Send
        + 'static,
    ) -> Result<(), Refusal> {
        let one = Arc::clone(self);
        let mut domains = lock(&self.inner).domains.take().unwrap_or_default();
        let thread = std::thread::Builder::new().name(name.to_owned());
        let spawned = thread.spawn(move || {
            let outcome = step(&one, &mut domains);
            one.settle(outcome, domains);
        });
        spawned.map(drop).map_err(|error| {
            let message = format!("no thread for the preparation: {error}");
            lock(&self.inner).state = PrepareState::Failed;
            Refusal::new(RefusalCode::Internal, message)
        })
    }

    fn settle(&self, outcome: Result<Outcome, job::JobError>, domains: BTreeMap<Secret, Domain>) {
        let mut inner = lock(&self.inner);
        inner.used = Instant::now();
        match outcome {
            Ok(outcome) => {
                inner.domains = Some(domains);
                inner.state = outcome.state;
                inner.message = outcome.message;
                inner.report = Some(outcome.report);
                inner.prepared = outcome.prepared;
            }
            Err(error) => {
                // What was remembered may be half of it: the next preparation begins anew.
                inner.state = PrepareState::Failed;
                inner.message = crate::host::chain(&error);
                tracing::warn!(group = self.spec.group, "preparation: {}", inner.message);
            }
        }
    }
}

/// What came of a step.
pub(crate) struct Outcome {
    state: PrepareState,
    message: String,
    report: HostSurvey,
    prepared: HashMap<Secret, Arc<Prepared>>,
}

fn busy(group: &str) -> Refusal {
    let message = format!("group `{group}` is being prepared already");
    Refusal::new(RefusalCode::Busy, message)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
