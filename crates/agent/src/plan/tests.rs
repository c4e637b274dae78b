use super::*;
use crate::types::{Compression, Sharing};

const PLAN: &str = r#"
preset = "oc"
compression = "zstd"

[hosts.a]
control = "10.0.0.1:7000"
bulk = "10.0.0.1:7001"
[hosts.b]
control = "[fd00::2]:7000"
bulk = "[fd00::2]:7001"

[[move]]
vm = "web-1"
from = "a"
to = "b"
qmp = "/run/vm/web-1.qmp"

[[move]]
vm = "db.2"
from = "b"
to = "a"
qmp = "/run/vm/db.qmp"
domain = "red"
replace = [{ from = "/run/a", to = "/run/b" }]
"#;

fn parse(text: &str) -> Result<Plan, String> {
    Plan::parse(Path::new("plan.toml"), text).map_err(|error| error.to_string())
}

fn refusal(find: &str, put: &str) -> String {
    assert!(PLAN.contains(find));
    parse(&PLAN.replacen(find, put, 1)).unwrap_err()
}

#[test]
fn a_plan_resolves_to_specs_in_its_order_with_the_preset_overridden() {
    let plan = parse(PLAN).unwrap();
    let keys = [("default", "00"), ("red", "11")]
        .map(|(name, key)| (name.to_owned(), key.to_owned()))
        .into();
    let specs = plan.specs("g1", &keys);
    assert_eq!(specs.len(), 2);
    assert_eq!(
        (specs[0].id.as_str(), specs[1].id.as_str()),
        ("g1/web-1", "g1/db.2")
    );
    assert_eq!(specs[0].target_bulk, "[fd00::2]:7001");
    assert_eq!(
        (specs[0].domain_key.as_str(), specs[1].domain_key.as_str()),
        ("00", "11")
    );
    assert_eq!(specs[0].settings.scope, Scope::None);
    assert_eq!(specs[0].settings.compression, Compression::Zstd);
    assert_eq!(specs[1].replace[0].to, "/run/b");
}

#[test]
fn a_plan_without_a_preset_is_full() {
    let plan = parse(&PLAN.replace("preset = \"oc\"", "")).unwrap();
    assert_eq!(plan.settings(), Preset::Full.settings());
}

#[test]
fn an_unknown_key_is_named_with_file_line_and_column() {
    let error = refusal("vm = \"web-1\"", "vm = \"web-1\"\nfrmo = \"a\"");
    assert!(error.starts_with("plan.toml:14:1: "), "{error}");
    assert!(error.contains("frmo"), "{error}");
    let error = refusal("\"oc\"", "\"warp\"");
    assert!(error.starts_with("plan.toml:2:10: "), "{error}");
    assert!(error.contains("warp"), "{error}");
}

#[test]
fn what_cannot_be_is_refused_with_the_names() {
    for (find, put, expected) in [
        (
            "\"db.2\"",
            "\"web-1\"",
            "VM `web-1` has two moves: a VM moves once in a plan",
        ),
        (
            "to = \"b\"",
            "to = \"c\"",
            "VM `web-1` moves to host `c`, which the plan's [hosts] does not have",
        ),
        (
            "to = \"b\"",
            "to = \"a\"",
            "VM `web-1` moves from host `a` to itself",
        ),
        (
            "[fd00::2]:7000",
            "10.0.0.1:7000",
            "VM `web-1` moves from host `a (two names of one agent)` to itself",
        ),
        (
            "10.0.0.1:7001",
            "10.0.0.1",
            "host `a`: `bulk` is `10.0.0.1`: it must be HOST:PORT",
        ),
        (
            "/run/vm/web-1.qmp",
            "web-1.qmp",
            "VM `web-1`: `qmp` must be an absolute path on the source host",
        ),
        (
            "from = \"/run/a\"",
            "from = \"\"",
            "VM `db.2`: `replace` has an empty `from`",
        ),
        (
            "domain = \"red\"",
            "definition = []",
            "VM `db.2`: `definition` is empty: it starts with the program",
        ),
        (
            "from = \"b\"\nto = \"a\"\nqmp = \"/run/vm/db.qmp\"",
            "from = \"a\"\nto = \"b\"\nqmp = \"/run/vm/web-1.qmp\"",
            "VM `db.2`: `qmp` is that of another move from the same host: each VM has its own",
        ),
    ] {
        assert_eq!(refusal(find, put), expected);
    }
    let error = refusal("web-1\"\nfrom", "../web\"\nfrom");
    assert!(error.starts_with("VM `../web`: a name is "), "{error}");
    let error = refusal("preset", "max_bandwidth_bytes_per_s = 10\npreset");
    assert!(
        error.starts_with("the plan: `max_bandwidth_bytes_per_s` is 10"),
        "{error}"
    );
    let empty = parse("move = []\n[hosts]\n").unwrap_err();
    assert!(empty.starts_with("the plan has 0 moves"), "{empty}");
}

#[test]
fn every_mode_goes_with_every_preset() {
    for preset in ["oc", "gang", "irlm", "slm", "full"] {
        let name = format!("preset = \"{preset}\"");
        let of_preset = parse(&PLAN.replace("preset = \"oc\"", &name)).unwrap();
        for (mode, expected) in [
            ("pre-copy", Mode::PreCopy),
            ("post-copy", Mode::PostCopy),
            ("hybrid", Mode::Hybrid),
        ] {
            let text = PLAN.replace("preset = \"oc\"", &name);
            let plan = parse(&format!("mode = \"{mode}\"\n{text}")).unwrap();
            let settings = Settings {
                mode: expected,
                ..of_preset.settings()
            };
            assert_eq!(plan.settings(), settings, "{preset} in {mode}");
        }
    }
}

#[test]
fn the_time_until_post_copy_is_one_of_hybrid_mode() {
    let plan = |mode: &str, seconds: u64| {
        let text = PLAN.replace("compression = \"zstd\"", "");
        let text = format!("mode = \"{mode}\"\npostcopy_after_s = {seconds}\n{text}");
        Plan::parse(Path::new("plan.toml"), &text)
    };
    let specs = plan("hybrid", 20).unwrap().specs("g", &BTreeMap::new());
    assert_eq!(specs[0].postcopy_after_s, Some(20));
    for mode in ["pre-copy", "post-copy"] {
        assert!(matches!(plan(mode, 20), Err(PlanError::PostcopyTime)));
    }
    assert!(matches!(plan("hybrid", 0), Err(PlanError::Limit { .. })));
}

#[test]
fn sharing_goes_with_every_scope_and_full_has_it() {
    let sharing = |preset: &str| {
        let text = PLAN.replace("preset = \"oc\"", preset);
        let plan = Plan::parse(Path::new("plan.toml"), &text);
        plan.unwrap().settings().sharing
    };
    let preserve = "\nsharing = \"preserve\"";
    for preset in ["oc", "gang", "irlm", "slm", "full"] {
        let preset = format!("preset = \"{preset}\"");
        assert_eq!(sharing(&(preset.clone() + preserve)), Sharing::Preserve);
        let has_it = preset.contains("slm") || preset.contains("full");
        assert_eq!(sharing(&preset) == Sharing::Preserve, has_it, "{preset}");
    }
}

/// The keys that a type takes, by what it says of one that it does not know.
fn keys_of<T: serde::de::DeserializeOwned>() -> Vec<String> {
    let error = toml::from_str::<T>("nonsense = 1").err().unwrap();
    let quoted = error.message().split('`').skip(1).step_by(2);
    quoted
        .filter(|key| *key != "nonsense")
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_key_of_plan_and_configuration_is_in_the_operators_document() {
    let document = include_str!("../../../../docs/operating.md");
    let keys = [
        keys_of::<Plan>(),
        keys_of::<crate::types::Host>(),
        keys_of::<PlanMove>(),
        keys_of::<crate::types::Replace>(),
        keys_of::<crate::types::Resident>(),
        keys_of::<crate::config::Config>(),
        keys_of::<crate::config::IndexConfig>(),
    ];
    assert!(keys.iter().all(|keys| keys.len() > 1), "{keys:?}");
    for key in keys.concat() {
        assert!(document.contains(&format!("`{key}`")), "{key}");
    }
}
