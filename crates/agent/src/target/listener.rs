//! Where sessions arrive.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use anyhow::Context;
use page::{ContentKey, HostNo};
use wire::{Channel, ControlReply, ControlRequest, Hello, WireCompression};

use crate::index_host::IndexHost;
use crate::link::{Decompressor, Link, LinkError, Serve, Terms};

use super::incoming::Arrivals;
use super::peer::PeerContext;
use super::rack::RackStores;
use super::receiver::{self, ReceiveError};
use super::resume::Resumption;
use super::session::{TargetSession, lock};

/// How long a control connection may be idle: a move's bulk phase, for as long as it takes.
const CONTROL_IDLE: Duration = Duration::from_secs(24 * 3600);

struct Listener {
    arrivals: Arc<Arrivals>,
    terms: Terms,
    sessions: Mutex<HashMap<String, Weak<TargetSession>>>,
    racks: Arc<RackStores>,
    index: Arc<IndexHost>,
}

/// Listens on `address` in threads of its own.
///
/// # Errors
/// An address that cannot be listened on.
pub(crate) fn listen(
    address: SocketAddr,
    arrivals: Arc<Arrivals>,
    racks: Arc<RackStores>,
    index: Arc<IndexHost>,
    terms: Terms,
) -> anyhow::Result<()> {
    let listener = Listener {
        arrivals,
        terms: terms.clone(),
        sessions: Mutex::default(),
        racks,
        index,
    };
    crate::link::listen(address, terms, listener).context("waiting for moves (`bulk`)")?;
    Ok(())
}

/// What target hosts use between each other: a source's or a peer's word may cost no more memory than that.
fn between_targets(asked: WireCompression) -> WireCompression {
    match asked {
        WireCompression::None => WireCompression::None,
        WireCompression::Zstd { window_log } => WireCompression::Zstd {
            window_log: window_log.min(super::peer::WINDOW_LOG),
        },
    }
}

/// The source closes when its last move is over.
fn ended(result: Result<(), ReceiveError>) -> anyhow::Result<()> {
    match result {
        Err(ReceiveError::Link(LinkError::Closed)) => Ok(()),
        other => Ok(other?),
    }
}

impl Serve for Listener {
    fn serve(&self, mut link: Link, hello: &Hello) -> anyhow::Result<()> {
        match hello.channel {
            Channel::Forward => self.forward(link, hello),
            Channel::Lane => {
                let session = self.welcome(&mut link, hello)?;
                session.cut_at_end(link.socket()?);
                let result = ended(receiver::run(link, &session));
                // One that the source closes has brought all that was on it; of one that breaks the
                // source hears, too.
                if result.is_err() {
                    session.end();
                }
                result
            }
            Channel::Back => {
                let session = self.welcome(&mut link, hello)?;
                let result = session.answer(link);
                session.end();
                Ok(result?)
            }
            Channel::Peer => self.peer(link, hello),
            Channel::Index => {
                link.send(&ControlReply::Welcome)?;
                Ok(self.index.serve(link)?)
            }
            Channel::Control => {
                link.send(&ControlReply::Welcome)?;
                link.set_timeout(CONTROL_IDLE);
                link.keep_alive()?;
                self.control(link, hello)
            }
        }
    }
}

impl Listener {
    fn forward(&self, mut link: Link, hello: &Hello) -> anyhow::Result<()> {
        let mut secret = [0; 32];
        let key = hello.domain_key.as_deref().unwrap_or_default();
        if hex::decode_to_slice(key, &mut secret).is_err() {
            return Ok(link.send(&ControlReply::Refused {
                reason: "no secret of the trust domain".into(),
            })?);
        }
        let store = self.arrivals.context.store_bytes;
        let key = ContentKey::new(secret);
        let unpacker = Decompressor::new(hello.compression)?;
        let rack = match &hello.rack {
            Some(rack) => {
                let context = PeerContext {
                    host: self.arrivals.context.host.clone(),
                    security: self.terms.security.clone(),
                    peer_timeout: self.terms.peer_timeout,
                    compression: between_targets(hello.compression),
                };
                Some(self.racks.join(rack, &key, &context, store)?)
            }
            None => None,
        };
        let session = Arc::new(TargetSession::new(key, store, rack, unpacker));
        // However it ends, also before its first frame: the rack's store counts it.
        let result = self.receive(link, hello, &session);
        session.end();
        self.arrivals.session_lost(&session);
        let is_another = |known: &Weak<TargetSession>| known.as_ptr() != Arc::as_ptr(&session);
        lock(&self.sessions).retain(|_, known| is_another(known));
        tracing::info!(
            source = hello.source,
            session = hello.session,
            "session ends"
        );
        result
    }

    /// Makes the session known, and takes its frames until it ends.
    fn receive(
        &self,
        mut link: Link,
        hello: &Hello,
        session: &Arc<TargetSession>,
    ) -> anyhow::Result<()> {
        session.cut_at_end(link.socket()?);
        {
            let mut sessions = lock(&self.sessions);
            sessions.retain(|_, session| session.strong_count() > 0);
            sessions.insert(hello.session.clone(), Arc::downgrade(session));
        }
        link.send(&ControlReply::Welcome)?;
        tracing::info!(
            source = hello.source,
            session = hello.session,
            "session begins"
        );
        ended(receiver::run(link, session))
    }

    /// Another target host of a group.
    fn peer(&self, mut link: Link, hello: &Hello) -> anyhow::Result<()> {
        let rack = hello.rack.as_ref();
        let found = rack.and_then(|rack| Some((self.racks.find(&rack.store)?, HostNo(rack.host))));
        let Some((store, from)) = found else {
            return Ok(link.send(&ControlReply::Refused {
                reason: "no VM of that group comes here".into(),
            })?);
        };
        link.send(&ControlReply::Welcome)?;
        let store = Arc::downgrade(&store);
        let compression = between_targets(hello.compression);
        let result = super::peer::receive(link, &store, from, compression);
        if let Some(store) = store.upgrade() {
            store.host_gone(from);
        }
        match result {
            Err(LinkError::Closed) => Ok(()),
            other => Ok(other?),
        }
    }

    fn session(&self, hello: &Hello) -> Option<Arc<TargetSession>> {
        lock(&self.sessions)
            .get(&hello.session)
            .and_then(Weak::upgrade)
    }

    fn welcome(&self, link: &mut Link, hello: &Hello) -> anyhow::Result<Arc<TargetSession>> {
        let Some(session) = self.session(hello) else {
            let reason = "there is no such session".to_owned();
            link.send(&ControlReply::Refused {
                reason: reason.clone(),
            })?;
            anyhow::bail!(reason);
        };
        link.send(&ControlReply::Welcome)?;
        Ok(session)
    }

    fn control(&self, mut link: Link, hello: &Hello) -> anyhow::Result<()> {
        loop {
            let request = match link.receive() {
                Ok(request) => request,
                Err(LinkError::Closed) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let reply = match request {
                ControlRequest::Open(request) => match self.session(hello) {
                    None => ControlReply::Refused {
                        reason: "there is no such session".into(),
                    },
                    Some(session) => match self.arrivals.open(&session, request) {
                        Ok(opened) => ControlReply::Ready {
                            pid: opened.pid,
                            note: opened.note,
                            preempt: opened.preempts,
                        },
                        Err(error) => ControlReply::Refused {
                            reason: format!("{error:#}"),
                        },
                    },
                },
                ControlRequest::Release { id } => ControlReply::State(self.arrivals.release(&id)),
                ControlRequest::Abort { id, reason } => {
                    ControlReply::State(self.arrivals.abort(&id, &reason))
                }
                ControlRequest::Resume { id, vm } => match self.session(hello) {
                    None => ControlReply::Refused {
                        reason: "there is no such session".into(),
                    },
                    Some(session) => match self.arrivals.resume(&session, &id, vm) {
                        Ok(Resumption::Ready { pid }) => ControlReply::Ready {
                            pid,
                            note: None,
                            preempt: false,
                        },
                        Ok(Resumption::Not(state)) => ControlReply::State(state),
                        Err(error) => ControlReply::Refused {
                            reason: format!("{error:#}"),
                        },
                    },
                },
                ControlRequest::Query { id } => ControlReply::State(self.arrivals.query(&id)),
            };
            link.send(&reply)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_target_host_cannot_ask_for_a_longer_window_than_it_gets() {
        let window = |window_log| between_targets(WireCompression::Zstd { window_log });
        assert_eq!(window(27), window(super::super::peer::WINDOW_LOG));
        assert_eq!(window(20), WireCompression::Zstd { window_log: 20 });
        let none = WireCompression::None;
        assert_eq!(between_targets(none), none);
    }
}
