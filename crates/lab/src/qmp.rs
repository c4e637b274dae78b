//! A small QMP client of the lab's own, so that what it sees does not depend on the code it tests.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::clock::UnixMs;
use crate::process;

/// How long QEMU may take to answer a command. A switch-over can block it for seconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Step in which a read wakes up to look at its deadline.
const STEP: Duration = Duration::from_millis(50);
/// Longest message of QEMU that is believed.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// Something that QEMU reported by itself.
#[derive(Clone, Debug)]
pub struct Event {
    /// `MIGRATION`, `STOP`, ...
    pub name: String,
    /// When, by QEMU's clock.
    pub at: UnixMs,
    /// The event's own fields.
    pub data: Value,
}

/// A connection to one QMP socket.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    /// Bytes read, of a message that is not complete yet.
    partial: Vec<u8>,
    events: VecDeque<Event>,
}

impl Qmp {
    /// Connects as soon as QEMU has made the socket.
    pub fn connect(path: &Path, patience: Duration) -> anyhow::Result<Self> {
        let deadline = Instant::now() + patience;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= deadline => {
                    return Err(error).with_context(|| format!("connecting to {}", path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        stream
            .set_read_timeout(Some(STEP))
            .context("setting a timeout")?;
        let mut qmp = Self {
            stream,
            partial: Vec::new(),
            events: VecDeque::new(),
        };
        let greeting = qmp.message(Instant::now() + ANSWER_TIMEOUT)?;
        anyhow::ensure!(
            greeting.is_some_and(|message| message.get("QMP").is_some()),
            "{} is not a QMP socket",
            path.display()
        );
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Process that listens at the other end.
    pub fn peer_pid(&self) -> anyhow::Result<u32> {
        process::peer_pid(&self.stream)
    }

    /// Runs a command and returns what it returns.
    pub fn execute(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let text = json!({"execute": command, "arguments": arguments}).to_string();
        self.stream
            .write_all(text.as_bytes())
            .with_context(|| format!("sending {command}"))?;
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        loop {
            let Some(mut message) = self.message(deadline)? else {
                bail!("QEMU did not answer `{command}` within {ANSWER_TIMEOUT:?}");
            };
            if let Some(result) = message.get_mut("return") {
                return Ok(result.take());
            }
            if let Some(error) = message.pointer("/error/desc").and_then(Value::as_str) {
                bail!("QEMU refused `{command}`: {error}");
            }
            self.keep_event(&message);
        }
    }

    /// Runs a command of the human monitor.
    pub fn human(&mut self, line: &str) -> anyhow::Result<String> {
        let text = self.execute("human-monitor-command", json!({"command-line": line}))?;
        Ok(text.as_str().unwrap_or_default().to_owned())
    }

    /// The next event, in the order of their arrival, or `None` at the deadline.
    pub fn next_event(&mut self, deadline: Instant) -> anyhow::Result<Option<Event>> {
        while self.events.is_empty() {
            match self.message(deadline)? {
                Some(message) => self.keep_event(&message),
                None => return Ok(None),
            }
        }
        Ok(self.events.pop_front())
    }

    fn keep_event(&mut self, message: &Value) {
        let Some(name) = message.get("event").and_then(Value::as_str) else {
            return;
        };
        let part = |name: &str| {
            message
                .pointer(&format!("/timestamp/{name}"))
                .and_then(Value::as_f64)
                .unwrap_or(0.0)
        };
        self.events.push_back(Event {
            name: name.to_owned(),
            at: UnixMs(part("seconds") * 1e3 + part("microseconds") / 1e3),
            data: message.get("data").cloned().unwrap_or(Value::Null),
        });
    }

    /// The next message, or `None` at the deadline.
    fn message(&mut self, deadline: Instant) -> anyhow::Result<Option<Value>> {
        loop {
            if let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.partial.drain(..=end).collect();
                return Ok(Some(serde_json::from_slice(&line).context("reading QMP")?));
            }
            anyhow::ensure!(
                self.partial.len() < MESSAGE_BYTES_MAX,
                "a QMP message has no end"
            );
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => bail!("QEMU closed its QMP socket"),
                Ok(count) => self.partial.extend_from_slice(&chunk[..count]),
                Err(error) if is_timeout(error.kind()) => {
                    if Instant::now() >= deadline {
                        return Ok(None);
                    }
                }
                Err(error) => return Err(error).context("reading QMP"),
            }
        }
    }
}

fn is_timeout(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn an_event_between_command_and_answer_is_kept_with_its_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut buffer = [0; 1024];
            stream.write_all(b"{\"QMP\": {}}\r\n").unwrap();
            assert_ne!(stream.read(&mut buffer).unwrap(), 0);
            stream.write_all(b"{\"return\": {}}\r\n").unwrap();
            assert_ne!(stream.read(&mut buffer).unwrap(), 0);
            let event =
                "{\"event\": \"STOP\", \"timestamp\": {\"seconds\": 2, \"microseconds\": 500}}";
            stream.write_all(event.as_bytes()).unwrap();
            stream
                .write_all(b"\r\n{\"return\": {\"running\": true}}\r\n")
                .unwrap();
        });
        let mut qmp = Qmp::connect(&path, Duration::from_secs(5)).unwrap();
        let answer = qmp.execute("query-status", json!({})).unwrap();
        assert_eq!(answer, json!({"running": true}));
        let event = qmp
            .next_event(Instant::now() + Duration::from_secs(5))
            .unwrap()
            .unwrap();
        assert_eq!((event.name.as_str(), event.at), ("STOP", UnixMs(2000.5)));
        server.join().unwrap();
        assert!(qmp.execute("query-status", json!({})).is_err());
    }
}
