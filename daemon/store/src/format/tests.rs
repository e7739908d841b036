//! `docs/FORMAT.md` and the tables in this folder are one text.

/// Table lines of the format sources, in the order of `docs/FORMAT.md`.
fn tables() -> Vec<&'static str> {
    let sources = [
        include_str!("record.rs"),
        include_str!("segment.rs"),
        include_str!("superblock.rs"),
    ];
    sources
        .iter()
        .flat_map(|source| source.lines())
        .filter_map(|line| line.strip_prefix("//! "))
        .filter(|line| line.starts_with('|'))
        .collect()
}

#[test]
fn format_md_repeats_every_table_and_carries_their_hash() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/FORMAT.md");
    let page = std::fs::read_to_string(path).expect("docs/FORMAT.md is there");
    let tables = tables();
    assert!(
        tables.len() > 60,
        "{} table lines are too few to be all",
        tables.len()
    );
    let on_page: Vec<&str> = page.lines().filter(|line| line.starts_with("| ")).collect();
    let ours = |line: &&&str| line.contains("off | len") || line.contains("off   | len");
    assert_eq!(
        tables.iter().filter(ours).count(),
        6,
        "six structures are on the device"
    );
    for line in tables.iter().filter(|line| line.starts_with("| ")) {
        assert!(
            on_page.contains(line),
            "docs/FORMAT.md lacks this line of a table:\n{line}"
        );
    }
    let hash = format!("{:08x}", crc32fast::hash(tables.join("\n").as_bytes()));
    assert!(
        page.contains(&hash),
        "read docs/FORMAT.md against the tables, then write {hash}"
    );
}
