//! A survey as text: pure functions.

use agent::types::{GroupSurvey, PageKinds};

use crate::render::{bytes, seconds, table};

const PAGE_BYTES: u64 = 4096;

/// What is duplicate within VMs, hosts and the rack.
pub(crate) fn found(survey: &GroupSurvey) -> String {
    let head = [
        "",
        "memory",
        "untouched",
        "zero",
        "fill",
        "content",
        "distinct",
        "duplicate",
    ];
    let mut lines = vec![head.map(str::to_owned)];
    for host in &survey.hosts {
        for vm in &host.vms {
            lines.push(line(format!("  {}", vm.vm), &vm.pages));
        }
        lines.push(line(format!("host {}", host.host), &host.pages));
    }
    lines.push(line("rack".to_owned(), &survey.rack));
    let estimated = if survey.exact {
        ""
    } else {
        "The rack's distinct contents are estimated from a sample, to about 1 %.\n"
    };
    let unknown = match survey.rack.unknown {
        0 => String::new(),
        pages => format!("{} could not be read.\n", bytes(pages * PAGE_BYTES)),
    };
    format!(
        "{}{} are needed by several target hosts. {estimated}{unknown}\
         Hashed in {:.1} s, with {:.2} s of processor time on all hosts together.\n",
        table(lines),
        bytes(survey.shared_by_targets * PAGE_BYTES),
        survey.seconds,
        survey.cpu_seconds,
    )
}

fn line(name: String, pages: &PageKinds) -> [String; 8] {
    let size = |pages: u64| bytes(pages * PAGE_BYTES);
    let duplicate = (pages.content - pages.distinct.min(pages.content)) * 100;
    [
        name,
        size(pages.total),
        size(pages.untouched),
        size(pages.zero),
        size(pages.fill),
        size(pages.content),
        size(pages.distinct),
        match pages.content {
            0 => "-".to_owned(),
            content => format!("{} %", duplicate / content),
        },
    ]
}

/// What a migration would cost.
pub(crate) fn forecast(survey: &GroupSurvey) -> String {
    let most = survey.forecast.iter().map(|one| one.core_bytes).max();
    let most = most.unwrap_or(0).max(1);
    let head = ["technique", "core bytes", "of most", "time"].map(str::to_owned);
    let line = |one: &agent::types::Forecast| {
        let permille = u128::from(one.core_bytes) * 1000 / u128::from(most);
        [
            one.technique.clone(),
            bytes(one.core_bytes),
            format!("{}.{} %", permille / 10, permille % 10),
            one.seconds.map_or("-".to_owned(), seconds),
        ]
    };
    let lines = std::iter::once(head).chain(survey.forecast.iter().map(line));
    format!(
        "\nForecast of a migration now, of guests that are idle meanwhile; nothing was moved.\n{}",
        table(lines.collect())
    )
}

#[cfg(test)]
mod tests {
    use agent::types::Forecast;

    use super::*;

    #[test]
    fn shares_are_of_the_contents_and_of_the_largest_forecast() {
        let rack = PageKinds {
            total: 1000,
            content: 400,
            distinct: 100,
            ..PageKinds::default()
        };
        let forecast_of = |technique: &str, core_bytes| Forecast {
            technique: technique.to_owned(),
            core_bytes,
            seconds: (core_bytes < 1000).then_some(61.0),
        };
        let survey = GroupSurvey {
            group: "g".to_owned(),
            hosts: Vec::new(),
            rack,
            exact: false,
            shared_by_targets: 0,
            forecast: vec![forecast_of("stock", 2000), forecast_of("full", 129)],
            seconds: 1.25,
            cpu_seconds: 0.5,
            failed: Vec::new(),
        };
        let text = found(&survey);
        assert!(
            text.contains("75 %") && text.contains("estimated"),
            "{text}"
        );
        let text = forecast(&survey);
        assert!(text.contains("100.0 %  -"), "{text}");
        assert!(text.contains("6.4 %    1 min 1 s"), "{text}");
    }
}
