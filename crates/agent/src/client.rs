//! Talks to the control API of an agent: this host's over its unix socket, others over TLS.
//!
//! A connection for each request: the API is called a few times for each move, and its long
//! answers (event streams) need one of their own anyway.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;

use crate::api::mover::{Refusal, RefusalCode};
use crate::tls::server_name;

/// The status of the largest group, of 4096 moves of a kilobyte, fits four times.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// One line of an event stream; the end of the largest group is the longest.
const LINE_BYTES_MAX: usize = 8 << 20;
/// Carries the agent's boot id on event streams: numbers of events mean nothing across boots.
pub(crate) const BOOT_HEADER: &str = "gangway-boot";

/// Where an agent's control API is.
#[derive(Clone, Debug)]
enum Endpoint {
    Unix(PathBuf),
    Tls(String, Arc<rustls::ClientConfig>),
    Plain(String),
}

/// A client of one agent; cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    endpoint: Endpoint,
    timeout: Duration,
}

/// Why a call did not give what was asked for.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The agent refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Nothing listens there, the network is down, or the TLS handshake failed.
    #[error("cannot connect to the agent at {endpoint}")]
    Connect {
        /// Socket or address.
        endpoint: String,
        /// What the system says.
        source: std::io::Error,
    },
    /// The agent did not answer in time; it may have acted.
    #[error("the agent at {endpoint} did not answer within {} s", timeout.as_secs())]
    Timeout {
        /// Socket or address.
        endpoint: String,
        /// How long it was waited for.
        timeout: Duration,
    },
    /// The connection broke; the agent may have acted.
    #[error("the connection to the agent at {endpoint} broke: {problem}")]
    Broken {
        /// Socket or address.
        endpoint: String,
        /// What happened.
        problem: String,
    },
    /// The answer is not what this version of gangway expects.
    #[error("the agent at {endpoint} answered {status} with something unexpected: {problem}")]
    Answer {
        /// Socket or address.
        endpoint: String,
        /// HTTP status.
        status: u16,
        /// What is wrong with it.
        problem: String,
    },
}

impl CallError {
    /// As a refusal to those who asked the caller.
    #[must_use]
    pub fn into_refusal(self) -> Refusal {
        match self {
            Self::Refused(refusal) => refusal,
            other => Refusal::new(RefusalCode::Unreachable, other.in_full()),
        }
    }

    /// The error with its cause, in one line.
    #[must_use]
    pub fn in_full(&self) -> String {
        match self {
            Self::Connect { source, .. } => format!("{self}: {source}"),
            _ => self.to_string(),
        }
    }

    /// Whether there is no process at the other end.
    #[must_use]
    pub fn nobody_listens(&self) -> bool {
        use std::io::ErrorKind::{ConnectionRefused, NotFound};
        matches!(self, Self::Connect { source, .. }
            if matches!(source.kind(), ConnectionRefused | NotFound))
    }

    /// Whether the agent may have done what it was asked, although it did not say so.
    #[must_use]
    pub fn may_have_acted(&self) -> bool {
        !matches!(self, Self::Refused(_) | Self::Connect { .. })
    }

    /// Whether the agent itself said no, so that asking again would give the same answer.
    #[must_use]
    pub fn refused_as(&self) -> Option<RefusalCode> {
        match self {
            Self::Refused(refusal) => Some(refusal.code),
            _ => None,
        }
    }
}

impl Client {
    /// The agent that serves this socket.
    #[must_use]
    pub fn unix(socket: &Path, timeout: Duration) -> Self {
        let endpoint = Endpoint::Unix(socket.to_owned());
        Self { endpoint, timeout }
    }

    /// The agent at `host:port`, over mutual TLS, or in the clear without a configuration.
    #[must_use]
    pub fn tcp(address: &str, tls: Option<Arc<rustls::ClientConfig>>, timeout: Duration) -> Self {
        let address = address.to_owned();
        let endpoint = match tls {
            Some(tls) => Endpoint::Tls(address, tls),
            None => Endpoint::Plain(address),
        };
        Self { endpoint, timeout }
    }

    /// Asks for a resource.
    pub async fn get<A: DeserializeOwned>(&self, path: &str) -> Result<A, CallError> {
        self.call::<(), A>(Method::GET, path, None).await
    }

    /// Sends a request with a body.
    pub async fn post<Q: Serialize, A: DeserializeOwned>(
        &self,
        path: &str,
        body: &Q,
    ) -> Result<A, CallError> {
        self.call(Method::POST, path, Some(body)).await
    }

    /// Changes a resource.
    pub async fn patch<Q: Serialize>(&self, path: &str, body: &Q) -> Result<(), CallError> {
        self.call(Method::PATCH, path, Some(body)).await
    }

    /// Follows a stream of events (`path` without query) from number `from` on.
    pub async fn events(&self, path: &str, from: u64) -> Result<EventStream, CallError> {
        let path = format!("{path}?from={from}");
        let response = self
            .within(self.send::<()>(Method::GET, &path, None))
            .await?;
        let boot = response
            .headers()
            .get(BOOT_HEADER)
            .and_then(|boot| boot.to_str().ok());
        let stream = EventStream {
            boot: boot.unwrap_or_default().to_owned(),
            body: response.into_body(),
            buffer: BytesMut::new(),
            scanned: 0,
            client: self.clone(),
        };
        Ok(stream)
    }

    async fn call<Q: Serialize, A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&Q>,
    ) -> Result<A, CallError> {
        let (status, bytes) = self
            .within(async {
                let response = self.send(method, path, body).await?;
                let status = response.status();
                Ok((status, self.collect(response).await?))
            })
            .await?;
        // An empty answer is JSON's null, which is (): the actions that only succeed.
        let text: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(text).map_err(|error| self.unexpected(status, &error.to_string()))
    }

    async fn within<T>(
        &self,
        call: impl Future<Output = Result<T, CallError>>,
    ) -> Result<T, CallError> {
        tokio::time::timeout(self.timeout, call)
            .await
            .unwrap_or_else(|_elapsed| {
                let (endpoint, timeout) = (self.endpoint.to_string(), self.timeout);
                Err(CallError::Timeout { endpoint, timeout })
            })
    }

    /// The response's head; a refusal is an error already.
    async fn send<Q: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&Q>,
    ) -> Result<Response<Incoming>, CallError> {
        let body = match body {
            Some(body) => serde_json::to_vec(body).map_err(|error| self.broken(&error))?,
            None => Vec::new(),
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, "gangway")
            .header(hyper::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| self.broken(&error))?;
        let mut sender = match &self.endpoint {
            Endpoint::Unix(path) => {
                let io = UnixStream::connect(path)
                    .await
                    .map_err(|error| self.no_connection(error))?;
                self.handshake(io).await?
            }
            Endpoint::Plain(address) => self.handshake(self.dial(address).await?).await?,
            Endpoint::Tls(address, tls) => {
                let name = server_name(address).ok_or_else(|| {
                    let kind = std::io::ErrorKind::InvalidInput;
                    self.no_connection(std::io::Error::new(kind, "not HOST:PORT"))
                })?;
                let tcp = self.dial(address).await?;
                let connecting = TlsConnector::from(tls.clone()).connect(name, tcp);
                let io = connecting
                    .await
                    .map_err(|error| self.no_connection(error))?;
                self.handshake(io).await?
            }
        };
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| self.broken(&error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let bytes = self.collect(response).await?;
        Err(match serde_json::from_slice::<Refusal>(&bytes) {
            Ok(refusal) => CallError::Refused(refusal),
            Err(_) => self.unexpected(status, &String::from_utf8_lossy(&bytes)),
        })
    }

    async fn dial(&self, address: &str) -> Result<TcpStream, CallError> {
        let tcp = TcpStream::connect(address)
            .await
            .map_err(|error| self.no_connection(error))?;
        // Requests are small and each waits for its answer.
        tcp.set_nodelay(true)
            .map_err(|error| self.no_connection(error))?;
        Ok(tcp)
    }

    async fn handshake<S: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
        &self,
        io: S,
    ) -> Result<Sender, CallError> {
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io))
            .await
            .map_err(|error| self.broken(&error))?;
        // Ends when the sender and the response are dropped; its errors reach them.
        tokio::spawn(connection);
        Ok(sender)
    }

    async fn collect(&self, response: Response<Incoming>) -> Result<Bytes, CallError> {
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX);
        Ok(body
            .collect()
            .await
            .map_err(|error| self.broken(&*error))?
            .to_bytes())
    }

    fn no_connection(&self, source: std::io::Error) -> CallError {
        let endpoint = self.endpoint.to_string();
        CallError::Connect { endpoint, source }
    }

    fn broken(&self, error: &(dyn std::error::Error + '_)) -> CallError {
        let mut problem = error.to_string();
        if let Some(source) = error.source() {
            problem = format!("{problem}: {source}");
        }
        CallError::Broken {
            endpoint: self.endpoint.to_string(),
            problem,
        }
    }

    fn unexpected(&self, status: StatusCode, problem: &str) -> CallError {
        // Enough of a foreign answer to recognise it.
        let problem = problem.chars().take(200).collect();
        CallError::Answer {
            endpoint: self.endpoint.to_string(),
            status: status.as_u16(),
            problem,
        }
    }
}

type Sender = hyper::client::conn::http1::SendRequest<Full<Bytes>>;

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tls(address, _) | Self::Plain(address) => address.fmt(f),
        }
    }
}

/// A stream of events, one JSON object a line; an empty line now and then says that the agent is
/// alive.
#[derive(Debug)]
pub struct EventStream {
    /// Identifies the agent's process: another boot counts its events from 0 again.
    pub boot: String,
    body: Incoming,
    buffer: BytesMut,
    /// So many bytes of the buffer hold no line's end.
    scanned: usize,
    client: Client,
}

impl EventStream {
    /// The next event; `None` at the orderly end of the stream. An agent that is silent for the
    /// client's timeout is an error.
    pub async fn next<E: DeserializeOwned>(&mut self) -> Result<Option<E>, CallError> {
        loop {
            let line = match self.line()? {
                Some(line) => line,
                None if self.more().await? => continue,
                None => return Ok(None),
            };
            if !line.is_empty() {
                let event = serde_json::from_slice(&line)
                    .map_err(|error| self.client.unexpected(StatusCode::OK, &error.to_string()))?;
                return Ok(Some(event));
            }
        }
    }

    fn line(&mut self) -> Result<Option<Bytes>, CallError> {
        let fresh = self.buffer.get(self.scanned..).unwrap_or_default();
        if let Some(end) = fresh.iter().position(|&byte| byte == b'\n') {
            let line = self.buffer.split_to(self.scanned + end).freeze();
            self.buffer.advance(1);
            self.scanned = 0;
            return Ok(Some(line));
        }
        self.scanned = self.buffer.len();
        if self.scanned > LINE_BYTES_MAX {
            return Err(self.client.unexpected(StatusCode::OK, "a line without end"));
        }
        Ok(None)
    }

    /// Waits for bytes; false at the end.
    async fn more(&mut self) -> Result<bool, CallError> {
        let client = self.client.clone();
        let frame = async { Ok(self.body.frame().await) };
        match client.within(frame).await? {
            None => Ok(false),
            Some(Err(error)) => Err(client.broken(&error)),
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    self.buffer.extend_from_slice(data);
                }
                Ok(true)
            }
        }
    }
}
