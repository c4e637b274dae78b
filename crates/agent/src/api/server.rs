//! The agent's process around the API: listeners, start, orderly stop.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::fs::{FlockOperation, flock};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::{AbortHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use super::mover::Mover;
use super::moves::Moves;
use super::routes::{Api, router};
use crate::config::Config;
use crate::coordinator::Coordinator;
use crate::tls::Tls;

/// Connections of a listener at once: a stream for each move of two groups, and some for people.
const CONNECTIONS_MAX: usize = 1024;
/// A peer that has not sent its request's head (or finished its TLS handshake) by then is cut.
const HEAD_TIME_MAX: Duration = Duration::from_secs(10);
/// An orderly stop waits so long for VMs between their hosts; then the journal takes over.
const STOP_TIME_MAX: Duration = Duration::from_secs(60);
const STOP_POLL: Duration = Duration::from_millis(50);
/// Streams need so long to deliver the last events.
const FAREWELL: Duration = Duration::from_millis(300);

/// Why an agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A directory or the control socket cannot be made.
    #[error("cannot prepare {}", path.display())]
    Prepare {
        /// What cannot be prepared.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Another agent runs with the same run directory.
    #[error("another agent runs with the run directory {}; a host has one agent", run_dir.display())]
    Running {
        /// The directory.
        run_dir: PathBuf,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {address} (`control` in the configuration)")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// Signals cannot be caught.
    #[error("cannot catch signals")]
    Signals(#[source] io::Error),
    /// The kernel gives no random bytes.
    #[error("cannot make a random id of this process: {0}")]
    Random(getrandom::Error),
}

/// A running agent.
pub struct Agent {
    moves: Arc<Moves>,
    listeners: JoinSet<()>,
    control: Option<SocketAddr>,
    socket: PathBuf,
    /// Locked for as long as the agent lives.
    _lock: fs::File,
}

/// Runs an agent until SIGTERM or SIGINT, then stops it in order; a second signal makes it leave
/// at once what the journal can finish.
pub async fn run(
    config: &Config,
    tls: Option<Tls>,
    mover: Arc<dyn Mover>,
) -> Result<(), ServeError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServeError::Signals)?;
    let agent = Agent::start(config, tls, mover).await?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tokio::select! {
        () = agent.stop() => {}
        _ = terminate.recv() => tracing::error!("told twice to stop; not waiting for moves"),
        _ = interrupt.recv() => tracing::error!("told twice to stop; not waiting for moves"),
    }
    Ok(())
}

impl Agent {
    /// Opens the listeners, recovers interrupted moves, follows the groups of before.
    pub async fn start(
        config: &Config,
        tls: Option<Tls>,
        mover: Arc<dyn Mover>,
    ) -> Result<Self, ServeError> {
        let lock = claim_run_dir(config)?;
        let moves = Arc::new(Moves::new(mover));
        // Before anyone can ask: a move that is not in the table counts as never begun.
        let recovering = moves.clone();
        // Joined only to have waited: a panic inside is logged by its thread.
        let _ = tokio::task::spawn_blocking(move || recovering.recover_interrupted()).await;
        let (server_tls, client_tls) = tls.map(|tls| (tls.server, tls.client)).unzip();
        let coordinator = Arc::new(Coordinator::new(config, client_tls));
        let mut boot = [0; 8];
        getrandom::fill(&mut boot).map_err(ServeError::Random)?;
        let router = router(Api {
            name: config.name.as_str().into(),
            boot: hex::encode(boot).into(),
            moves: moves.clone(),
            coordinator: coordinator.clone(),
            cow_library: config.cow_library.as_deref().map(Arc::from),
        });
        let socket = config.control_socket();
        let unix = listen_unix(&socket).map_err(|source| ServeError::Prepare {
            path: socket.clone(),
            source,
        })?;
        let mut tcp = None;
        if let Some(address) = config.control {
            let listen = |source| ServeError::Listen { address, source };
            let listener = TcpListener::bind(address).await.map_err(listen)?;
            tcp = Some((listener.local_addr().map_err(listen)?, listener));
        }
        // Before anyone is answered: a group that is not in the table counts as unknown. Its agents,
        // this one among them, are asked through the listeners, where they wait meanwhile.
        coordinator.adopt_saved();
        let mut listeners = JoinSet::new();
        listeners.spawn(Server::new(router.clone()).serve_unix(unix));
        let control = tcp.map(|(address, listener)| {
            let tls = server_tls.map(TlsAcceptor::from);
            listeners.spawn(Server::new(router).serve_tcp(listener, tls));
            address
        });
        tracing::info!(name = config.name, socket = %socket.display(), "the agent is ready");
        Ok(Self {
            moves,
            listeners,
            control,
            socket,
            _lock: lock,
        })
    }

    /// Address of the TCP listener, with its real port.
    #[must_use]
    pub fn control_address(&self) -> Option<SocketAddr> {
        self.control
    }

    /// Stops in order: takes nothing new, cancels moves whose VM runs at the source, and waits,
    /// for a minute at most, for those whose VM is between the hosts.
    pub async fn stop(mut self) {
        let moves = self.moves.clone();
        // Joined only to have waited: a panic inside is logged by its thread.
        let _ = tokio::task::spawn_blocking(move || moves.stop()).await;
        let deadline = Instant::now() + STOP_TIME_MAX;
        while self.is_busy() && Instant::now() < deadline {
            tokio::time::sleep(STOP_POLL).await;
        }
        for status in self
            .moves
            .list()
            .iter()
            .filter(|status| !status.phase.is_final())
        {
            tracing::error!(
                id = status.id,
                "the agent stops while VM `{}` is between its hosts ({:?}); start it again, it \
                 will finish or undo the move",
                status.vm,
                status.phase
            );
        }
        tokio::time::sleep(FAREWELL).await;
        self.listeners.shutdown().await;
        if let Err(error) = fs::remove_file(&self.socket) {
            tracing::warn!("cannot remove {}: {error}", self.socket.display());
        }
    }

    /// Closes the listeners and leaves every move as it is, for the journal to finish.
    pub async fn leave(mut self) {
        self.listeners.shutdown().await;
    }

    fn is_busy(&self) -> bool {
        let under_way = self
            .moves
            .list()
            .iter()
            .any(|status| !status.phase.is_final());
        under_way || !self.moves.incoming().is_empty()
    }
}

/// Makes the run directory and locks it against other agents.
fn claim_run_dir(config: &Config) -> Result<fs::File, ServeError> {
    let prepare = |path: PathBuf| move |source| ServeError::Prepare { path, source };
    for dir in [&config.run_dir, &config.state_dir] {
        fs::create_dir_all(dir).map_err(prepare(dir.clone()))?;
    }
    let path = config.run_dir.join("lock");
    let lock = fs::File::create(&path).map_err(prepare(path.clone()))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(ServeError::Running {
            run_dir: config.run_dir.clone(),
        }),
        Err(error) => Err(prepare(path)(error.into())),
    }
}

/// Listens on a socket that only this user can connect to. The run directory is locked, so a
/// socket that is there already is a dead agent's.
fn listen_unix(socket: &PathBuf) -> io::Result<UnixListener> {
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // Bound under a name that nobody knows, and shown only once its mode is right.
    let hidden = socket.with_extension("new");
    let _ = fs::remove_file(&hidden);
    let listener = UnixListener::bind(&hidden)?;
    fs::set_permissions(&hidden, fs::Permissions::from_mode(0o600))?;
    fs::rename(&hidden, socket)?;
    Ok(listener)
}

/// Serves the router on the accepted connections of one listener.
struct Server {
    router: Router,
    /// Each listener has its own: strangers at the port keep nobody from the socket.
    connections: Arc<Semaphore>,
}

impl Server {
    fn new(router: Router) -> Self {
        Self {
            router,
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        }
    }

    /// A connection's place, which it needs from its first byte on; none if all are taken.
    fn place(&self) -> Option<OwnedSemaphorePermit> {
        let place = self.connections.clone().try_acquire_owned().ok();
        if place.is_none() {
            tracing::warn!("more than {CONNECTIONS_MAX} connections; one was cut");
        }
        place
    }

    async fn serve_unix(self, listener: UnixListener) {
        let mut tasks = Connections::default();
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    if let Some(place) = self.place() {
                        tasks.add(serve(self.router.clone(), place, stream));
                    }
                }
                Err(error) => pause_after(&error).await,
            }
        }
    }

    async fn serve_tcp(self, listener: TcpListener, tls: Option<TlsAcceptor>) {
        let mut tasks = Connections::default();
        loop {
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    pause_after(&error).await;
                    continue;
                }
            };
            let Some(place) = self.place() else {
                continue;
            };
            let router = self.router.clone();
            let Some(tls) = tls.clone() else {
                tasks.add(serve(router, place, stream));
                continue;
            };
            tasks.add(async move {
                match tokio::time::timeout(HEAD_TIME_MAX, tls.accept(stream)).await {
                    Ok(Ok(stream)) => serve(router, place, stream).await,
                    Ok(Err(error)) => tracing::warn!(%peer, "TLS handshake failed: {error}"),
                    Err(_elapsed) => tracing::warn!(%peer, "TLS handshake took too long"),
                }
            });
        }
    }
}

/// Serves one connection, which gives its place back when it ends.
async fn serve(
    router: Router,
    _place: OwnedSemaphorePermit,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) {
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    if let Err(error) = connection.await {
        tracing::debug!("a connection of the control API ended: {error}");
    }
}

/// The tasks of a listener's connections; they end with it.
#[derive(Default)]
struct Connections {
    tasks: JoinSet<()>,
}

impl Connections {
    fn add(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        while self.tasks.try_join_next().is_some() {}
        let _: AbortHandle = self.tasks.spawn(task);
    }
}

/// Out of file descriptors, most likely: they come back.
async fn pause_after(error: &io::Error) {
    tracing::error!("cannot accept a connection: {error}");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpStream;

    use super::*;
    use crate::api::testing::write_certificates;

    #[tokio::test]
    async fn a_connection_takes_its_place_before_its_handshake() {
        let dir = tempfile::tempdir().unwrap();
        write_certificates(dir.path(), &["127.0.0.1"]);
        let tls = Tls::load(dir.path()).unwrap().server;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = Server {
            router: Router::new(),
            connections: Arc::new(Semaphore::new(1)),
        };
        let serving = tokio::spawn(server.serve_tcp(listener, Some(TlsAcceptor::from(tls))));
        let _silent = TcpStream::connect(address).await.unwrap();
        let mut second = TcpStream::connect(address).await.unwrap();
        let mut byte = [0];
        let cut = tokio::time::timeout(HEAD_TIME_MAX / 2, second.read(&mut byte)).await;
        // An end or a reset, and no handshake that is waited for.
        assert!(matches!(cut, Ok(Ok(0) | Err(_))), "{cut:?}");
        serving.abort();
    }
}
