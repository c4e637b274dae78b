//! The monitor's client against servers that behave in every way but the expected one.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use guest::{Qmp, QmpError, Recovery, TargetGuest};
use serde_json::{Value, json};

const GREETING: &str = r#"{"QMP":{"version":{"qemu":{"major":10,"minor":0,"micro":2},"package":""},"capabilities":["oob"]}}"#;
const TIMEOUT: Duration = Duration::from_secs(5);

/// A server for one client that does as its script says.
struct Server {
    path: PathBuf,
    _dir: tempfile::TempDir,
    thread: Option<JoinHandle<()>>,
}

/// The server's end of the connection.
struct Peer {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Server {
    fn run(script: impl FnOnce(Peer) + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            script(Peer {
                reader: BufReader::new(stream.try_clone().unwrap()),
                writer: stream,
            });
        });
        Self {
            path,
            _dir: dir,
            thread: Some(thread),
        }
    }

    /// One that has greeted and negotiated before its script runs.
    fn negotiated(script: impl FnOnce(Peer) + Send + 'static) -> Self {
        Self::run(|mut peer| {
            peer.say(GREETING);
            let command = peer.next_command();
            assert_eq!(command["execute"], "qmp_capabilities");
            peer.answer(&command, json!({}));
            script(peer);
        })
    }

    fn connect(&self) -> Result<(Qmp, std::sync::mpsc::Receiver<guest::QmpEvent>), QmpError> {
        Qmp::connect(&self.path, TIMEOUT)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let ended = self.thread.take().map(JoinHandle::join);
        if !thread::panicking() {
            assert!(
                ended.is_some_and(|ended| ended.is_ok()),
                "the server's script failed"
            );
        }
    }
}

impl Peer {
    fn say(&mut self, line: &str) {
        self.writer
            .write_all(format!("{line}\r\n").as_bytes())
            .unwrap();
    }

    fn next_command(&mut self) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn answer(&mut self, command: &Value, value: Value) {
        self.say(&json!({ "return": value, "id": command["id"] }).to_string());
    }

    fn wait_for_end(&mut self) {
        let mut rest = String::new();
        assert_eq!(self.reader.read_line(&mut rest).unwrap_or(0), 0, "{rest}");
    }
}

#[test]
fn a_socket_that_does_not_greet_is_called_busy_in_time() {
    let server = Server::run(|mut peer| peer.wait_for_end());
    let start = Instant::now();
    let error = Qmp::connect(&server.path, Duration::from_millis(200)).unwrap_err();
    assert!(matches!(error, QmpError::Busy { .. }), "{error}");
    assert!(error.to_string().contains("serves one client at a time"));
    assert!(start.elapsed() < TIMEOUT);
}

#[test]
fn a_target_is_recovered_beside_its_main_loop_as_soon_as_it_has_paused() {
    let server = Server::run(|mut peer| {
        peer.say(GREETING);
        let command = peer.next_command();
        assert_eq!(command["arguments"], json!({ "enable": ["oob"] }));
        peer.answer(&command, json!({}));
        for _ in 0..3 {
            let command = peer.next_command();
            assert_eq!(command["exec-oob"], "migrate-recover");
            let error = json!({ "class": "GenericError", "desc": "postcopy is not paused" });
            peer.say(&json!({ "error": error, "id": command["id"] }).to_string());
        }
        let command = peer.next_command();
        assert_eq!(command["arguments"], json!({ "uri": "unix:/run/new" }));
        peer.answer(&command, json!({}));
        peer.wait_for_end();
    });
    let target = TargetGuest::adopt(std::process::id(), &server.path).unwrap();
    let recovered = target.recover(Path::new("/run/new")).unwrap();
    assert_eq!(recovered, Recovery::Waits);
    drop(target);
}

#[test]
fn a_target_that_has_all_memory_is_not_recovered() {
    let server = Server::run(|mut peer| {
        peer.say(GREETING);
        let command = peer.next_command();
        peer.answer(&command, json!({}));
        let command = peer.next_command();
        peer.say(r#"{"event":"MIGRATION","data":{"status":"postcopy-active"}}"#);
        peer.say(r#"{"event":"MIGRATION","data":{"status":"completed"}}"#);
        let error = json!({ "class": "GenericError", "desc": "postcopy is not paused" });
        peer.say(&json!({ "error": error, "id": command["id"] }).to_string());
        peer.wait_for_end();
    });
    let target = TargetGuest::adopt(std::process::id(), &server.path).unwrap();
    let recovered = target.recover(Path::new("/run/new")).unwrap();
    assert_eq!(recovered, Recovery::Complete);
    drop(target);
}

#[test]
fn a_missing_socket_is_a_connect_error_with_its_path() {
    let error = Qmp::connect("/nonexistent/qmp".as_ref(), TIMEOUT).unwrap_err();
    assert!(matches!(error, QmpError::Connect { .. }), "{error}");
    assert!(error.to_string().contains("/nonexistent/qmp"));
}

#[test]
fn a_human_monitor_is_recognised() {
    let server = Server::run(|mut peer| peer.say("QEMU 10.0.2 monitor - type 'help'"));
    let error = server.connect().unwrap_err();
    assert!(matches!(error, QmpError::NotQmp { .. }), "{error}");
    assert!(error.to_string().contains("QEMU 10.0.2 monitor"));
}

#[test]
fn a_server_that_greets_and_then_is_silent_times_out() {
    let server = Server::run(|mut peer| {
        peer.say(GREETING);
        peer.next_command();
        peer.wait_for_end();
    });
    let error = Qmp::connect(&server.path, Duration::from_millis(200)).unwrap_err();
    assert!(matches!(error, QmpError::Timeout { .. }), "{error}");
}

#[test]
fn a_refusal_carries_class_and_words() {
    let server = Server::negotiated(|mut peer| {
        let id = peer.next_command()["id"].clone();
        peer.say(
            &json!({ "id": id, "error": { "class": "GenericError", "desc": "no" } }).to_string(),
        );
    });
    let (qmp, _events) = server.connect().unwrap();
    let error = qmp.execute("migrate", json!({ "uri": "x" })).unwrap_err();
    let QmpError::Command {
        command,
        class,
        desc,
    } = error
    else {
        panic!("{error}")
    };
    assert_eq!(
        (command.as_str(), class.as_str(), desc.as_str()),
        ("migrate", "GenericError", "no")
    );
}

#[test]
fn events_between_command_and_answer_reach_the_receiver_in_order() {
    let server = Server::negotiated(|mut peer| {
        let command = peer.next_command();
        for name in ["STOP", "MIGRATION"] {
            let time = json!({ "seconds": 1, "microseconds": 2 });
            peer.say(&json!({ "event": name, "timestamp": time }).to_string());
        }
        peer.say(&json!({ "return": "of a command that nobody waits for", "id": 999 }).to_string());
        peer.say(&json!({ "future": "extension" }).to_string());
        peer.answer(&command, json!(7));
    });
    let (qmp, events) = server.connect().unwrap();
    assert_eq!(qmp.execute("x", Value::Null).unwrap(), 7);
    let seen: Vec<_> = events
        .try_iter()
        .map(|event| (event.name, event.at_unix_us))
        .collect();
    assert_eq!(
        seen,
        [
            ("STOP".to_owned(), 1_000_002),
            ("MIGRATION".to_owned(), 1_000_002)
        ]
    );
}

#[test]
fn answers_in_another_order_reach_the_thread_that_asked() {
    let server = Server::negotiated(|mut peer| {
        let commands: Vec<_> = (0..8).map(|_| peer.next_command()).collect();
        for command in commands.iter().rev() {
            peer.answer(command, command["arguments"]["n"].clone());
        }
    });
    let (qmp, _events) = server.connect().unwrap();
    thread::scope(|scope| {
        for n in 0..8 {
            let qmp = qmp.clone();
            scope.spawn(move || assert_eq!(qmp.execute("echo", json!({ "n": n })).unwrap(), n));
        }
    });
}

#[test]
fn an_endless_line_ends_the_connection() {
    let server = Server::negotiated(|mut peer| {
        peer.next_command();
        let spaces = [b' '; 1 << 16];
        // The client hangs up after 16 MiB.
        let sent = (0..1024)
            .take_while(|_| peer.writer.write_all(&spaces).is_ok())
            .count();
        assert!(sent < 1024);
    });
    let (qmp, _events) = server.connect().unwrap();
    let error = qmp.execute("x", Value::Null).unwrap_err();
    assert!(matches!(error, QmpError::Closed { .. }), "{error}");
    assert!(error.to_string().contains("line above"), "{error}");
}

#[test]
fn invalid_json_fails_the_waiting_command_and_all_later_ones() {
    let server = Server::negotiated(|mut peer| {
        peer.next_command();
        peer.say("{\"return\": [[[");
        peer.wait_for_end();
    });
    let (qmp, events) = server.connect().unwrap();
    for _ in 0..2 {
        let error = qmp.execute("x", Value::Null).unwrap_err();
        assert!(matches!(error, QmpError::Closed { .. }), "{error}");
        assert!(error.to_string().contains("not QMP"), "{error}");
    }
    assert!(
        events.recv().is_err(),
        "the event channel ends with the connection"
    );
}

#[test]
fn a_qemu_that_ends_during_a_command_is_an_error_at_once() {
    let server = Server::negotiated(|mut peer| {
        peer.next_command();
    });
    let (qmp, _events) = server.connect().unwrap();
    let error = qmp.execute("quit", Value::Null).unwrap_err();
    assert!(matches!(error, QmpError::Closed { .. }), "{error}");
}

#[test]
fn events_that_nobody_reads_do_not_stop_the_answers() {
    let server = Server::negotiated(|mut peer| {
        let command = peer.next_command();
        for n in 0..10_000 {
            peer.say(&json!({ "event": "E", "data": { "n": n } }).to_string());
        }
        peer.answer(&command, json!("here"));
    });
    let (qmp, events) = server.connect().unwrap();
    assert_eq!(qmp.execute("x", Value::Null).unwrap(), "here");
    let kept: Vec<_> = events
        .try_iter()
        .map(|event| event.data["n"].as_u64().unwrap())
        .collect();
    assert!(kept.len() < 10_000);
    assert!(
        kept.iter().copied().eq(0..kept.len() as u64),
        "the first ones are kept, in order"
    );
}

#[test]
fn the_connection_closes_with_the_last_clone() {
    let server = Server::negotiated(|mut peer| {
        let command = peer.next_command();
        peer.answer(&command, json!({}));
        peer.wait_for_end();
    });
    let (qmp, events) = server.connect().unwrap();
    let clone = qmp.clone();
    drop(qmp);
    clone.execute("x", Value::Null).unwrap();
    drop(clone);
    assert!(events.recv().is_err());
}
