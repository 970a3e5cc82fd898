//! Kubernetes quantities of bytes: `10Gi`, `500M`, `1024`.
//! Source: <https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/>.

const UNITS: [(&str, u64); 8] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
];

/// Reads a whole number of bytes; the error says what would be right. A size beyond 2^64 bytes is read as that number, which is
/// outside of every bound.
pub fn bytes(text: &str) -> Result<u64, String> {
    let unit = UNITS.iter().find(|(unit, _)| text.ends_with(unit));
    let (digits, factor) = unit.map_or((text, 1), |(unit, factor)| (&text[..text.len() - unit.len()], *factor));
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        let shown: String = text.chars().take(60).flat_map(char::escape_debug).collect();
        return Err(format!("'{shown}' is not a size such as 512Mi or 10Gi"));
    }
    let number: u64 = digits.parse().unwrap_or(u64::MAX); // only digits: too many of them
    Ok(number.saturating_mul(factor))
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes_are_read_as_kubernetes_reads_them() {
        assert_eq!(super::bytes("10Gi"), Ok(10 << 30));
        assert_eq!(super::bytes("500M"), Ok(500_000_000));
        assert_eq!(super::bytes("7"), Ok(7));
        for bad in ["", "-1Gi", "+1Gi", "1.5Gi", "Gi", "10GiB"] {
            assert!(super::bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_size_beyond_all_disks_does_not_wrap() {
        for text in ["99999999999Ti", "18446744073709551616", "17179869184Gi"] {
            assert_eq!(super::bytes(text), Ok(u64::MAX), "{text}");
        }
    }
}
