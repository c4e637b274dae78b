//! Messages of the index channel: the first byte is the number, the rest the body.

#![no_main]

use libfuzzer_sys::fuzz_target;
use wire::index::{
    Answer, EntryRun, FrameBuffer, MAX_IDS, MAX_INDEX_BODY, MAX_RUN_ENTRIES, MAX_RUNS, Request,
};

fuzz_target!(|input: &[u8]| {
    let Some((&kind, body)) = input.split_first() else {
        return;
    };
    if let Ok(request) = Request::decode(kind, body) {
        check_request(&request);
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        let (kind, body) = frame(&bytes);
        assert_eq!(Request::decode(kind, &body), Ok(request));
    }
    if let Ok(answer) = Answer::decode(kind, body) {
        match &answer {
            Answer::Entries(entries) => assert!(entries.len() <= MAX_IDS),
            Answer::Verdicts(verdicts) => assert!(verdicts.len() <= MAX_IDS),
            Answer::Welcome { .. } => {}
            Answer::Summary(summary) => assert!(summary.shared() <= summary.contents()),
        }
        let mut bytes = Vec::new();
        answer.encode(&mut bytes);
        let (kind, body) = frame(&bytes);
        assert_eq!(Answer::decode(kind, &body), Ok(answer));
    }
});

fn check_request(request: &Request<'_>) {
    match request {
        Request::Register { items, .. } => {
            assert!(items.len() <= MAX_IDS && items.iter().all(|item| item.pages > 0));
        }
        Request::Claim { ids, .. } | Request::Seed { ids, .. } | Request::Shared { ids, .. } => {
            assert!(ids.len() <= MAX_IDS);
        }
        Request::Carried { entries } | Request::Lost { entries, .. } => check_runs(entries),
        _ => {}
    }
}

fn check_runs(runs: &[EntryRun]) {
    assert!(runs.len() <= MAX_RUNS);
    assert!(runs.iter().map(|run| run.count).sum::<u32>() <= MAX_RUN_ENTRIES);
    for run in runs {
        let last = run.first.plus(run.count - 1);
        assert!(!last.is_local() && last.shard() == run.first.shard());
    }
}

/// What was accepted can be said again in one frame.
fn frame(bytes: &[u8]) -> (u8, Vec<u8>) {
    let mut buffer = FrameBuffer::default();
    buffer.push(bytes);
    let (kind, body) = buffer
        .next_frame()
        .expect("within the limit")
        .expect("a whole frame");
    assert!(body.len() <= MAX_INDEX_BODY);
    (kind, body.to_vec())
}
