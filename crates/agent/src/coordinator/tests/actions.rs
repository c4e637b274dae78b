//! What people ask of groups, while agents are slow, silent or being asked.

use std::time::Instant;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::post;
use tokio::net::TcpListener;

use super::*;
use crate::api::fake::Preparing;
use crate::types::{PreparationRequest, PreparationStatus, PrepareBounds};

/// An agent that takes connections at this one's address and never answers.
async fn silence(agent: &mut TestAgent) -> TcpListener {
    agent.kill().await;
    let address = agent.config.control.unwrap();
    TcpListener::bind(address).await.unwrap()
}

#[tokio::test]
async fn a_silent_source_keeps_no_other_from_being_asked_whoever_waits_for_the_answer() {
    let on_a = [
        ("slow", Script::NeverConverges),
        ("slower", Script::NeverConverges),
    ];
    let (mut a, b) = pair(&on_a, &[("web", Script::NeverConverges)]).await;
    let moves = [("slow", "a", "b"), ("slower", "a", "b"), ("web", "b", "a")];
    accept(&b.client(), plan(&a, &b, &moves)).await.unwrap();
    let copies = |one: &crate::types::GroupMove| one.status.phase == Phase::Bulk;
    wait_for(&b.client(), |group| group.moves.iter().all(copies)).await;
    let _silent = silence(&mut a).await;

    let impatient = Client::unix(&b.socket(), Duration::from_millis(300));
    let web = Selection {
        vm: Some("web".to_owned()),
    };
    let all = Selection::default();
    let path = "/v1/groups/g/cancel";
    let answer = impatient.post::<_, ActionReport>(path, &all).await;
    assert!(answer.unwrap_err().may_have_acted());
    wait_for(&b.client(), |group| {
        group.moves[2].status.phase == Phase::Stayed
    })
    .await;

    let begin = Instant::now();
    let patient = Client::unix(&b.socket(), TIMEOUT * 4);
    let report: ActionReport = patient.post(path, &all).await.unwrap();
    // Not once for each of its moves.
    assert!(begin.elapsed() < TIMEOUT * 2, "{:?}", begin.elapsed());
    let refused: Vec<_> = report.refused.iter().map(|one| one.vm.as_deref()).collect();
    assert_eq!(refused, [Some("slow"), Some("slower")]);
    assert!(
        report
            .refused
            .iter()
            .all(|one| one.code == RefusalCode::Unreachable)
    );
    assert!(report.done.is_empty());
    let late = patient.post::<_, ActionReport>(path, &web).await.unwrap();
    assert_eq!(late.refused[0].code, RefusalCode::TooLate);
}

#[tokio::test]
async fn a_group_can_be_seen_and_cancelled_while_the_agents_are_asked() {
    let slow = post(|| async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        StatusCode::NO_CONTENT
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let router = Router::new().route("/v1/admit", slow);
    tokio::spawn(async move { axum::serve(listener, router).await });

    let (a, b) = pair(&[("web", Script::Moves)], &[]).await;
    let mut plan = plan(&a, &b, &[("web", "a", "b")]);
    plan.prepare = Some(false);
    plan.hosts.get_mut("b").unwrap().control = address;
    let client = a.client();
    let accepting = {
        let client = client.clone();
        tokio::spawn(async move { accept(&client, plan).await })
    };
    let seen = async {
        loop {
            match client.get::<GroupStatus>("/v1/groups/g").await {
                Ok(status) => return status,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    let seen = tokio::time::timeout(TIMEOUT, seen).await.unwrap();
    assert_eq!(seen.moves[0].status.phase, Phase::Queued);
    let message = &seen.moves[0].status.message;
    assert!(message.contains("are being asked"), "{message}");
    let all = Selection::default();
    let report: ActionReport = client.post("/v1/groups/g/cancel", &all).await.unwrap();
    assert_eq!(report.done, ["web"]);
    assert!(!accepting.is_finished());

    accepting.await.unwrap().unwrap();
    let ended = finished(&client).await;
    assert_eq!(outcomes(&ended), [("web", Phase::Stayed)]);
    let moves: Vec<MoveStatus> = client.get("/v1/moves").await.unwrap();
    assert!(moves.is_empty(), "it was never started");
}

#[tokio::test]
async fn those_who_watch_a_group_that_is_refused_see_its_end() {
    let (a, mut b) = pair(&[("web", Script::Moves)], &[]).await;
    let plan = plan(&a, &b, &[("web", "a", "b")]);
    let _silent = silence(&mut b).await;
    let patient = Client::unix(&a.socket(), TIMEOUT * 4);
    let accepting = tokio::spawn(async move { accept(&patient, plan).await });
    let client = a.client();
    let wait = async {
        while client.get::<GroupStatus>("/v1/groups/g").await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(TIMEOUT, wait).await.unwrap();
    let ended = finished(&client).await;
    assert_eq!(outcomes(&ended), [("web", Phase::Stayed)]);
    let message = &ended.outcomes[0].status.message;
    assert!(message.contains("nothing was started"), "{message}");
    let refused = accepting.await.unwrap().unwrap_err();
    assert_eq!(refused.refused_as(), Some(RefusalCode::Unreachable));
    let gone = client.get::<GroupStatus>("/v1/groups/g").await.unwrap_err();
    assert_eq!(gone.refused_as(), Some(RefusalCode::UnknownGroup));
}

#[tokio::test]
async fn memory_that_was_given_away_during_preparation_refuses_the_group_before_it_starts() {
    let (a, b) = pair(&[("web", Script::Moves)], &[]).await;
    a.host.set_preparing(Preparing::NeverEnds);
    let client = a.client();
    let plan = Plan {
        scope: Some(crate::types::Scope::Rack),
        ..plan(&a, &b, &[("web", "a", "b")])
    };
    accept(&client, plan).await.unwrap();
    wait_for(&client, |group| {
        group.moves[0].status.message.contains("hashed, 25 %")
    })
    .await;
    b.host.set_free(VM_BYTES - 1);
    a.host.set_preparing(Preparing::Works);
    let ended = finished(&client).await;
    assert_eq!(outcomes(&ended), [("web", Phase::Stayed)]);
    let message = &ended.outcomes[0].status.message;
    assert!(
        message.contains("VM `web`") && message.contains("bytes of memory"),
        "{message}"
    );
    let moves: Vec<MoveStatus> = client.get("/v1/moves").await.unwrap();
    assert!(moves.is_empty(), "it was never started");
    assert_eq!(a.host.vms(), ["web"]);
}

#[tokio::test]
async fn what_is_said_of_a_preparation_stays_with_no_vm() {
    let (a, b) = pair(&[("web", Script::Moves)], &[]).await;
    a.host.set_preparing(Preparing::Fails);
    let client = a.client();
    let plan = Plan {
        scope: Some(crate::types::Scope::Rack),
        ..plan(&a, &b, &[("web", "a", "b")])
    };
    accept(&client, plan).await.unwrap();
    let ended = finished(&client).await;
    assert_eq!(ended.outcomes[0].status.note, None);
    let mut stream = client.events("/v1/groups/g/events", 0).await.unwrap();
    let mut told = false;
    while let Some(event) = stream.next::<GroupEvent>().await.unwrap() {
        if let GroupEvent::Move(event) = event
            && let crate::types::Happening::Note { message } = event.what
        {
            told |= message.contains("without its preparation");
        }
    }
    assert!(told, "the group's readers hear it");
}

#[tokio::test]
async fn surveys_that_are_done_make_room_for_others() {
    let (a, b) = pair(&[("web", Script::Moves)], &[]).await;
    let client = a.client();
    let request = PreparationRequest {
        plan: plan(&a, &b, &[("web", "a", "b")]),
        survey: true,
        hosts: Vec::new(),
        bounds: PrepareBounds::default(),
    };
    for number in 0..=crate::coordinator::GROUPS_MAX {
        let accepted: Result<GroupAccepted, _> = client.post("/v1/preparations", &request).await;
        let accepted = accepted.unwrap_or_else(|error| panic!("survey {number}: {error}"));
        let path = format!("/v1/preparations/{}", accepted.group);
        while !client
            .get::<PreparationStatus>(&path)
            .await
            .unwrap()
            .finished
        {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}
