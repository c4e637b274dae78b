//! Numbers as people read them.

/// "0.71 GB": powers of 1000.
pub(crate) fn wire_bytes(bytes: f64) -> String {
    scaled(bytes, 1000.0, &["B", "kB", "MB", "GB", "TB"])
}

/// "512 MiB": powers of 1024.
pub(crate) fn memory_bytes(bytes: f64) -> String {
    scaled(bytes, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"])
}

/// "100 Mbit/s".
pub(crate) fn bits_per_second(bits: f64) -> String {
    scaled(
        bits,
        1000.0,
        &["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"],
    )
}

pub(crate) fn seconds(seconds: f64) -> String {
    format!("{} s", three_digits(seconds))
}

pub(crate) fn milliseconds(milliseconds: f64) -> String {
    format!("{} ms", three_digits(milliseconds))
}

/// "14 %"; one decimal below 10 %, so that small shares stay visible.
pub(crate) fn percent(share: f64) -> String {
    let percent = share * 100.0;
    if percent.abs() >= 9.95 || percent == 0.0 {
        format!("{percent:.0} %")
    } else if percent < 0.05 {
        "below 0.1 %".to_owned()
    } else {
        format!("{percent:.1} %")
    }
}

/// "0.14".
pub(crate) fn ratio(ratio: f64) -> String {
    format!("{ratio:.2}")
}

/// "1 048 576", in groups of three.
pub(crate) fn count(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push('\u{202f}');
        }
        out.push(digit);
    }
    out
}

/// "158 thousand", "1.25 million".
pub(crate) fn pages(pages: f64) -> String {
    let (value, unit) = match pages {
        many if many >= 1e6 => (many / 1e6, " million"),
        some if some >= 1e3 => (some / 1e3, " thousand"),
        few => (few, ""),
    };
    format!("{}{unit}", three_digits(value))
}

/// "1 VM", "2 VMs".
pub(crate) fn plural(n: u64, noun: &str) -> String {
    let s = if n == 1 { "" } else { "s" };
    format!("{} {noun}{s}", count(n))
}

fn scaled(value: f64, base: f64, units: &[&str]) -> String {
    let mut value = value;
    let mut units = units.iter();
    let mut unit = units.next().copied().unwrap_or_default();
    for larger in units {
        // 999.5 would be written as "1000".
        if value.abs() < base - 0.5 {
            break;
        }
        value /= base;
        unit = larger;
    }
    format!("{} {unit}", three_digits(value))
}

/// Three significant digits, without an exponent and without a tail of zeros.
fn three_digits(value: f64) -> String {
    let decimals = match value.abs() {
        size if size >= 99.95 => 0,
        size if size >= 9.995 => 1,
        _ => 2,
    };
    let text = format!("{value:.decimals$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_change_unit_where_people_expect_it() {
        assert_eq!(wire_bytes(0.0), "0 B");
        assert_eq!(wire_bytes(999.0), "999 B");
        assert_eq!(wire_bytes(98_200_000.0), "98.2 MB");
        assert_eq!(wire_bytes(999_600_000.0), "1 GB");
        assert_eq!(memory_bytes(268_435_456.0), "256 MiB");
        assert_eq!(memory_bytes(1_073_741_824.0), "1 GiB");
        assert_eq!(bits_per_second(1e8), "100 Mbit/s");
    }

    #[test]
    fn three_digits_are_kept_and_zeros_dropped() {
        assert_eq!(seconds(12.34), "12.3 s");
        assert_eq!(seconds(120.4), "120 s");
        assert_eq!(milliseconds(0.5), "0.5 ms");
    }

    #[test]
    fn a_small_share_is_not_written_as_nothing() {
        assert_eq!(percent(0.0), "0 %");
        assert_eq!(percent(0.0001), "below 0.1 %");
        assert_eq!(percent(0.014), "1.4 %");
        assert_eq!(percent(0.85), "85 %");
    }

    #[test]
    fn many_pages_are_written_in_words() {
        assert_eq!(pages(12.0), "12");
        assert_eq!(pages(15_400.0), "15.4 thousand");
        assert_eq!(pages(50_000.0), "50 thousand");
        assert_eq!(pages(1_250_000.0), "1.25 million");
    }

    #[test]
    fn counts_are_grouped_by_three() {
        assert_eq!(count(999), "999");
        assert_eq!(count(1_048_576), "1\u{202f}048\u{202f}576");
        assert_eq!(plural(1, "VM"), "1 VM");
        assert_eq!(plural(24, "VM"), "24 VMs");
    }
}
