//! The API over real sockets, around a host in memory.

use std::os::unix::fs::PermissionsExt;

use super::fake::{FakeHost, Script};
use super::mover::{Bandwidth, Refusal, RefusalCode};
use super::server::ServeError;
use super::testing::{TIMEOUT, TestAgent, write_certificates};
use crate::client::{CallError, Client};
use crate::plan::DEFAULT_DOMAIN;
use crate::tls::Tls;
use crate::types::{AgentStatus, Happening, MoveEvent, MoveSpec, MoveStatus, Phase, Plan};

const MEMORY: u64 = 64 << 30;

pub(super) fn spec(vm: &str) -> MoveSpec {
    let text = format!(
        "[hosts]\na = {{ control = \"h1:1\", bulk = \"h1:2\" }}\n\
         b = {{ control = \"h2:1\", bulk = \"h2:2\" }}\n\
         [[move]]\nvm = \"{vm}\"\nfrom = \"a\"\nto = \"b\"\nqmp = \"/q\"\n"
    );
    let plan = Plan::parse("p".as_ref(), &text).unwrap();
    let keys = [(DEFAULT_DOMAIN.to_owned(), "5a".repeat(32))].into();
    plan.specs("g", &keys).remove(0)
}

async fn events_to_the_end(client: &Client, id: &str, from: u64) -> Vec<MoveEvent> {
    let mut stream = client
        .events(&format!("/v1/moves/{id}/events"), from)
        .await
        .unwrap();
    let mut events = Vec::new();
    while let Some(event) = stream.next().await.unwrap() {
        events.push(event);
    }
    events
}

fn phases(events: &[MoveEvent]) -> Vec<Phase> {
    let phase = |event: &MoveEvent| match event.what {
        Happening::Phase { phase, .. } => Some(phase),
        _ => None,
    };
    events.iter().filter_map(phase).collect()
}

fn refusal<T: std::fmt::Debug>(answer: Result<T, CallError>) -> Refusal {
    match answer.unwrap_err() {
        CallError::Refused(refusal) => refusal,
        other => panic!("expected a refusal, got {other}"),
    }
}

async fn wait_for(client: &Client, id: &str, phase: Phase) {
    let wait = async {
        while client
            .get::<MoveStatus>(&format!("/v1/moves/{id}"))
            .await
            .unwrap()
            .phase
            != phase
        {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(TIMEOUT, wait).await.unwrap();
}

#[tokio::test]
async fn a_move_is_started_followed_from_anywhere_and_remembered() {
    let agent = TestAgent::start(FakeHost::new([("web", Script::Moves)], MEMORY), None).await;
    let client = agent.client();
    let mode = std::fs::metadata(agent.socket())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);

    let status: MoveStatus = client.post("/v1/moves", &spec("web")).await.unwrap();
    assert!(status.phase < Phase::Moved);
    let events = events_to_the_end(&client, "g/web", 0).await;
    use Phase::{Bulk, Loaded, Moved, Preparing, Queued, Released, SwitchOver};
    let expected = [Queued, Preparing, Bulk, SwitchOver, Loaded, Released, Moved];
    assert_eq!(phases(&events), expected);
    let numbers: Vec<_> = events.iter().map(|event| event.seq).collect();
    assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());

    let tail = events_to_the_end(&client, "g/web", 3).await;
    assert_eq!(tail, events[3..]);
    let again = refusal(
        client
            .post::<_, MoveStatus>("/v1/moves", &spec("web"))
            .await,
    );
    assert_eq!(
        (again.code, again.vm.as_deref()),
        (RefusalCode::Busy, Some("web"))
    );
    let late = refusal(client.post::<_, ()>("/v1/moves/g/web/cancel", &()).await);
    assert_eq!(late.code, RefusalCode::TooLate);
    let page = raw_get(&agent, "/metrics").await;
    assert!(
        page.contains("gangway_moves_ended_total{outcome=\"moved\"} 1\n"),
        "{page}"
    );
    assert!(
        page.contains("gangway_wire_bytes_total 67108864\n"),
        "{page}"
    );
}

async fn raw_get(agent: &TestAgent, path: &str) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::UnixStream::connect(agent.socket())
        .await
        .unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn a_move_is_cancelled_limited_held_and_continued() {
    let vms = [("busy", Script::NeverConverges), ("held", Script::Moves)];
    let agent = TestAgent::start(FakeHost::new(vms, MEMORY), None).await;
    let client = agent.client();

    client
        .post::<_, MoveStatus>("/v1/moves", &spec("busy"))
        .await
        .unwrap();
    let limits = Bandwidth {
        move_bytes_per_s: Some(1 << 20),
        group_bytes_per_s: None,
    };
    client
        .patch("/v1/moves/g/busy/bandwidth", &limits)
        .await
        .unwrap();
    assert_eq!(agent.host.limits(), [("g/busy".to_owned(), limits)]);
    let not_held = refusal(client.post::<_, ()>("/v1/moves/g/busy/continue", &()).await);
    assert_eq!(not_held.code, RefusalCode::NotHeld);
    client
        .post::<_, ()>("/v1/moves/g/busy/cancel", &())
        .await
        .unwrap();
    let events = events_to_the_end(&client, "g/busy", 0).await;
    assert_eq!(phases(&events).last(), Some(&Phase::Stayed));

    let held = MoveSpec {
        confirm_handover: true,
        ..spec("held")
    };
    client
        .post::<_, MoveStatus>("/v1/moves", &held)
        .await
        .unwrap();
    wait_for(&client, "g/held", Phase::Held).await;
    client
        .post::<_, ()>("/v1/moves/g/held/continue", &())
        .await
        .unwrap();
    let events = events_to_the_end(&client, "g/held", 0).await;
    assert_eq!(phases(&events).last(), Some(&Phase::Moved));
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_with_its_place() {
    let agent = TestAgent::start(FakeHost::new([("web", Script::Moves)], MEMORY), None).await;
    let client = agent.client();
    let key = serde_json::json!({ "move_bytes_per_s": 1, "grup": 2 });
    let unknown_key = refusal(client.patch("/v1/moves/g/web/bandwidth", &key).await);
    assert_eq!(unknown_key.code, RefusalCode::BadRequest);
    assert!(unknown_key.message.contains("grup"), "{unknown_key}");
    assert!(unknown_key.message.contains("line 1"), "{unknown_key}");

    for (broken, expected) in [
        (
            MoveSpec {
                id: "g/other".to_owned(),
                ..spec("web")
            },
            "GROUP/VM",
        ),
        (
            MoveSpec {
                domain_key: "00".to_owned(),
                ..spec("web")
            },
            "64 hex digits",
        ),
        (
            MoveSpec {
                target_bulk: "nowhere".to_owned(),
                ..spec("web")
            },
            "HOST:PORT",
        ),
    ] {
        let refused = refusal(client.post::<_, MoveStatus>("/v1/moves", &broken).await);
        assert_eq!(refused.code, RefusalCode::BadRequest);
        assert!(refused.message.contains(expected), "{refused}");
    }
    let unknown = refusal(client.get::<MoveStatus>("/v1/moves/g/nobody").await);
    assert_eq!(unknown.code, RefusalCode::UnknownMove);
    let nowhere = refusal(client.get::<()>("/v1/nowhere").await);
    assert_eq!(nowhere.code, RefusalCode::BadRequest);
    let started: Vec<MoveStatus> = client.get("/v1/moves").await.unwrap();
    assert_eq!(started, []);
    client
        .post::<_, MoveStatus>("/v1/moves", &spec("web"))
        .await
        .unwrap();
    let nonsense = refusal(client.get::<()>("/v1/moves/g/web/events?from=x").await);
    assert_eq!(nonsense.code, RefusalCode::BadRequest);
}

#[tokio::test]
async fn the_port_serves_who_shows_a_certificate_of_the_same_ca_and_nobody_else() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_certificates(ours.path(), &["127.0.0.1"]);
    write_certificates(theirs.path(), &["127.0.0.1"]);
    let host = FakeHost::new([("web", Script::Moves)], MEMORY);
    let agent = TestAgent::start(host, Some(ours.path())).await;
    let address = agent.addresses().control;
    let client = |tls| Client::tcp(&address, tls, TIMEOUT);

    let ours = client(Some(Tls::load(ours.path()).unwrap().client));
    let status: AgentStatus = ours.get("/v1/status").await.unwrap();
    assert_eq!(status.name, "test");

    let theirs = client(Some(Tls::load(theirs.path()).unwrap().client));
    let error = theirs.get::<AgentStatus>("/v1/status").await.unwrap_err();
    assert!(matches!(error, CallError::Connect { .. }), "{error}");
    let plain = client(None)
        .get::<AgentStatus>("/v1/status")
        .await
        .unwrap_err();
    assert!(matches!(plain, CallError::Broken { .. }), "{plain}");

    let by_wrong_name = Client::tcp(&address.replace("127.0.0.1", "127.0.0.2"), None, TIMEOUT);
    assert!(
        by_wrong_name
            .get::<AgentStatus>("/v1/status")
            .await
            .is_err()
    );
}

#[tokio::test]
async fn a_certificate_without_a_known_issuer_does_not_pass_even_if_the_client_trusts_the_server() {
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write_certificates(ours.path(), &["127.0.0.1"]);
    write_certificates(theirs.path(), &["127.0.0.1"]);
    let agent = TestAgent::start(FakeHost::new([], MEMORY), Some(ours.path())).await;
    let forged = {
        let pem = |dir: &std::path::Path, name: &str| std::fs::read(dir.join(name)).unwrap();
        use rustls::pki_types::pem::PemObject;
        use rustls::pki_types::{CertificateDer, PrivateKeyDer};
        let certificate = |bytes: &[u8]| CertificateDer::from_pem_slice(bytes).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots
            .add(certificate(&pem(ours.path(), "ca-cert.pem")))
            .unwrap();
        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(
                vec![certificate(&pem(theirs.path(), "client-cert.pem"))],
                PrivateKeyDer::from_pem_slice(&pem(theirs.path(), "client-key.pem")).unwrap(),
            )
            .unwrap()
    };
    let client = Client::tcp(&agent.addresses().control, Some(forged.into()), TIMEOUT);
    // In TLS 1.3 the client learns of its rejection after its handshake, with the first read.
    let error = client.get::<AgentStatus>("/v1/status").await.unwrap_err();
    assert!(
        matches!(error, CallError::Broken { .. } | CallError::Connect { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_second_agent_is_refused_and_a_dead_agents_socket_is_taken_over() {
    let mut agent = TestAgent::start(FakeHost::new([], MEMORY), None).await;
    let second = agent.start_again().await;
    assert!(matches!(second, Err(ServeError::Running { .. })));
    assert!(
        agent
            .client()
            .get::<AgentStatus>("/v1/status")
            .await
            .is_ok()
    );
    agent.kill().await;
    assert!(agent.socket().exists());
    agent.start_again().await.unwrap();
    assert!(
        agent
            .client()
            .get::<AgentStatus>("/v1/status")
            .await
            .is_ok()
    );
}

#[tokio::test]
async fn an_orderly_stop_leaves_every_vm_running_at_one_end() {
    let vms = [("busy", Script::NeverConverges), ("quick", Script::Moves)];
    let mut agent = TestAgent::start(FakeHost::new(vms, MEMORY), None).await;
    let client = agent.client();
    client
        .post::<_, MoveStatus>("/v1/moves", &spec("busy"))
        .await
        .unwrap();
    let path = "/v1/moves/g/busy/events";
    let mut stream = client.events(path, 0).await.unwrap();
    agent.stop().await;
    let mut last = None;
    while let Ok(Some(MoveEvent { what, .. })) = stream.next().await {
        last = Some(what);
    }
    assert!(
        matches!(
            last,
            Some(Happening::Phase {
                phase: Phase::Stayed,
                ..
            })
        ),
        "{last:?}"
    );
    assert_eq!(agent.host.vms(), ["busy", "quick"]);
    assert!(!agent.socket().exists());
}

#[tokio::test]
async fn interrupted_moves_are_recovered_at_the_start_and_a_person_can_ask_again() {
    let host = FakeHost::new([("lost", Script::NeedsPerson)], MEMORY);
    let agent = TestAgent::start(host.with_interrupted(vec![spec("cut")]), None).await;
    let client = agent.client();
    let events = events_to_the_end(&client, "g/cut", 0).await;
    assert_eq!(phases(&events), [Phase::Recovering, Phase::Moved]);

    client
        .post::<_, MoveStatus>("/v1/moves", &spec("lost"))
        .await
        .unwrap();
    let first = events_to_the_end(&client, "g/lost", 0).await;
    assert_eq!(phases(&first).last(), Some(&Phase::NeedsPerson));
    client
        .post::<_, ()>("/v1/moves/g/lost/recover", &())
        .await
        .unwrap();
    let next = first.last().unwrap().seq + 1;
    let second = events_to_the_end(&client, "g/lost", next).await;
    assert_eq!(phases(&second), [Phase::Recovering, Phase::Moved]);
    let again = refusal(client.post::<_, ()>("/v1/moves/g/lost/recover", &()).await);
    assert_eq!(again.code, RefusalCode::TooLate);
    // Counters do not fall when what needed a person has moved after all.
    let page = raw_get(&agent, "/metrics").await;
    for (how, count) in [("needs-person", 1), ("moved", 2)] {
        let line = format!("gangway_moves_ended_total{{outcome=\"{how}\"}} {count}\n");
        assert!(page.contains(&line), "{page}");
    }
}

#[tokio::test]
async fn what_was_known_of_a_vm_outlives_a_recovery_that_cannot_begin() {
    let host = FakeHost::new([("lost", Script::NeedsPerson)], MEMORY);
    let agent = TestAgent::start(host.without_journal(), None).await;
    let client = agent.client();
    client
        .post::<_, MoveStatus>("/v1/moves", &spec("lost"))
        .await
        .unwrap();
    events_to_the_end(&client, "g/lost", 0).await;
    let before: MoveStatus = client.get("/v1/moves/g/lost").await.unwrap();
    let refused = refusal(client.post::<_, ()>("/v1/moves/g/lost/recover", &()).await);
    assert_eq!(refused.vm.as_deref(), Some("lost"));
    assert!(refused.message.contains("journal"), "{refused}");
    assert!(refused.message.contains(&before.message), "{refused}");
    let after: MoveStatus = client.get("/v1/moves/g/lost").await.unwrap();
    assert_eq!(
        (after.phase, after.message),
        (Phase::NeedsPerson, before.message)
    );
}

#[test]
fn the_published_description_of_the_api_is_up_to_date() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/api/openapi.json");
    let now = super::openapi().to_pretty_json().unwrap() + "\n";
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        std::fs::write(path, &now).unwrap();
    }
    let published = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        published == now,
        "docs/api/openapi.json is stale: UPDATE_OPENAPI=1 cargo test -p agent published"
    );
}
