//! `gangway index`: the real binary, asked over its socket.

#![expect(clippy::unwrap_used, reason = "a failed set-up must stop the test")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use index::{Answer, Client, TableKey, Verdict};
use page::{ContentId, HostNo};
use wire::{Channel, ControlReply, Hello, MAGIC, PROTOCOL_VERSION, WireCompression};

const TIMEOUT: Duration = Duration::from_secs(20);

/// A running index. It dies with the test.
struct Index {
    child: Child,
    address: String,
    log: BufReader<std::process::ChildStderr>,
    _dir: tempfile::TempDir,
}

impl Drop for Index {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn config(dir: &tempfile::TempDir, keys: &str) -> PathBuf {
    let path = dir.path().join("index.toml");
    let text = format!("name = \"i\"\nbulk = \"127.0.0.1:0\"\n{keys}");
    std::fs::write(&path, text).unwrap();
    path
}

fn command(config: &PathBuf) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gangway"));
    command.args(["index", "--config"]).arg(config);
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    command
}

impl Index {
    fn start(keys: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = config(&dir, &format!("insecure_plaintext = true\n{keys}"));
        Self::ready(command(&path).spawn().unwrap(), dir)
    }

    /// Waits until it is ready.
    fn ready(mut child: Child, dir: tempfile::TempDir) -> Self {
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("the index is ready") {
            line.clear();
            assert!(log.read_line(&mut line).unwrap() > 0, "it has ended");
        }
        let address = line.split("address=").nth(1).unwrap();
        Self {
            child,
            address: address.split_whitespace().next().unwrap().to_owned(),
            log,
            _dir: dir,
        }
    }

    fn connect(&self, channel: Channel) -> (TcpStream, ControlReply) {
        let mut tcp = TcpStream::connect(&self.address).unwrap();
        tcp.set_read_timeout(Some(TIMEOUT)).unwrap();
        let hello = Hello {
            version: PROTOCOL_VERSION,
            session: String::new(),
            channel,
            source: "s1".into(),
            compression: WireCompression::None,
            domain_key: None,
            rack: None,
        };
        tcp.write_all(&MAGIC).unwrap();
        tcp.write_all(&wire::encode_control(&hello).unwrap())
            .unwrap();
        let mut length = [0; 4];
        tcp.read_exact(&mut length).unwrap();
        let mut json = vec![0; u32::from_le_bytes(length) as usize];
        tcp.read_exact(&mut json).unwrap();
        (tcp, wire::decode_control(&json).unwrap())
    }
}

/// A client of the index's table.
struct Asker {
    tcp: TcpStream,
    client: Client,
}

impl Asker {
    fn join(index: &Index) -> Self {
        let (tcp, reply) = index.connect(Channel::Index);
        assert_eq!(reply, ControlReply::Welcome);
        let client = Client::new();
        let mut asker = Self { tcp, client };
        let key = TableKey {
            group: "g-1".into(),
            domain: [7; 16],
        };
        let welcome = asker.ask(|client, out| {
            client.join(key, out);
        });
        assert!(
            matches!(welcome, Answer::Welcome { shard: 3, .. }),
            "{welcome:?}"
        );
        asker
    }

    fn ask(&mut self, ask: impl FnOnce(&mut Client, &mut Vec<u8>)) -> Answer {
        let mut out = Vec::new();
        ask(&mut self.client, &mut out);
        self.tcp.write_all(&out).unwrap();
        let mut input = [0; 4096];
        loop {
            if let Some((_, answer)) = self.client.poll_answer().unwrap() {
                return answer;
            }
            let count = self.tcp.read(&mut input).unwrap();
            self.client.handle(&input[..count]);
        }
    }

    fn claim(&mut self, target: u16, contents: &[u8]) -> Vec<Verdict> {
        let ids: Vec<_> = contents.iter().map(|&byte| ContentId([byte; 16])).collect();
        let answer = self.ask(|client, out| {
            client.claim(HostNo(target), &ids, out);
        });
        match answer {
            Answer::Verdicts(verdicts) => verdicts,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn one_agent_carries_what_two_agents_claim() {
    let index = Index::start("shard = 3\n");
    let (mut one, mut other) = (Asker::join(&index), Asker::join(&index));
    let first = one.claim(0, &[1, 2]);
    assert!(
        first
            .iter()
            .all(|verdict| matches!(verdict, Verdict::Carry { .. })),
        "{first:?}"
    );
    let second = other.claim(1, &[2]);
    assert!(
        matches!(
            second[..],
            [Verdict::At {
                carrier: HostNo(0),
                ..
            }]
        ),
        "{second:?}"
    );
}

#[test]
fn whoever_takes_it_for_an_agent_is_told_so() {
    let index = Index::start("");
    for channel in [
        Channel::Forward,
        Channel::Back,
        Channel::Control,
        Channel::Peer,
    ] {
        let (_, reply) = index.connect(channel);
        let ControlReply::Refused { reason } = reply else {
            panic!("{channel:?}: {reply:?}")
        };
        assert!(reason.contains("an index and no agent"), "{reason}");
    }
}

#[test]
fn it_ends_in_order_when_it_is_told_to() {
    let mut index = Index::start("");
    let pid = rustix::process::Pid::from_child(&index.child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(index.child.wait().unwrap().code(), Some(0));
    let mut log = String::new();
    index.log.read_to_string(&mut log).unwrap();
    assert!(log.contains("the index ends"), "{log}");
}

#[test]
fn a_wrong_configuration_is_exit_2_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    for (keys, expected) in [
        ("max_entrys = 5\n", "index.toml:3:1: "),
        ("", "`tls_dir` is absent"),
        ("insecure_plaintext = true\nshard = 16\n", "0 to 15"),
    ] {
        let output = command(&config(&dir, keys)).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(expected), "{said}");
    }
    let missing = command(&"/nonexistent/index.toml".into()).output().unwrap();
    assert_eq!(missing.status.code(), Some(2));
}

#[test]
fn a_taken_address_is_named() {
    let index = Index::start("");
    let dir = tempfile::tempdir().unwrap();
    let path = config(&dir, "insecure_plaintext = true\n");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("127.0.0.1:0", &index.address)).unwrap();
    let output = command(&path).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_ne!(output.status.code(), Some(0));
    assert!(said.contains(&index.address), "{said}");
}

#[test]
fn as_many_files_can_be_open_as_the_system_lets() {
    let dir = tempfile::tempdir().unwrap();
    let path = config(&dir, "insecure_plaintext = true\n");
    let mut command = Command::new("sh");
    command.args([
        "-c",
        "ulimit -S -n 256 && exec \"$0\" index --config \"$1\"",
    ]);
    command.arg(env!("CARGO_BIN_EXE_gangway")).arg(&path);
    let child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn();
    let index = Index::ready(child.unwrap(), dir);
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", index.child.id())).unwrap();
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let numbers: Vec<&str> = files.unwrap().split_whitespace().skip(3).take(2).collect();
    assert_eq!(numbers[0], numbers[1], "{limits}");
    assert_ne!(numbers[0], "256");
}
