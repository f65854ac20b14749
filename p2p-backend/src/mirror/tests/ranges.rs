//! Ranges against a slice.

use std::sync::OnceLock;

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Asked {
    Nothing,
    Between(u64, u64),
    From(u64),
    Last(u64),
}

impl Asked {
    fn header(&self) -> Option<String> {
        match self {
            Self::Nothing => None,
            Self::Between(first, last) => Some(format!("bytes={first}-{last}")),
            Self::From(first) => Some(format!("bytes={first}-")),
            Self::Last(count) => Some(format!("bytes=-{count}")),
        }
    }

    /// What a slice of the content says; none where there is nothing.
    fn of<'c>(&self, content: &'c [u8]) -> Option<(usize, &'c [u8])> {
        let size = content.len();
        let (start, end) = match *self {
            Self::Nothing => (0, size),
            Self::Between(first, last) => (first as usize, (last as usize + 1).min(size)),
            Self::From(first) => (first as usize, size),
            Self::Last(count) => (size.saturating_sub(count as usize), size),
        };
        content.get(start..end).filter(|slice| !slice.is_empty()).map(|slice| (start, slice))
    }
}

const SIZE: u64 = 5 * MIB as u64 + 12_345;

fn offset() -> impl Strategy<Value = u64> {
    let edges = (0..7_u64, 0..5_u64).prop_map(|(piece, near)| (piece * MIB as u64 + near).saturating_sub(2));
    prop_oneof![3 => edges, 2 => 0..SIZE + 1000, 1 => Just(SIZE - 1), 1 => Just(SIZE)]
}

fn asked() -> impl Strategy<Value = Asked> {
    prop_oneof![
        1 => Just(Asked::Nothing),
        6 => (offset(), offset()).prop_map(|(one, other)| Asked::Between(one.min(other), one.max(other))),
        2 => offset().prop_map(Asked::From),
        2 => offset().prop_map(Asked::Last),
    ]
}

struct Bed {
    runtime: tokio::runtime::Runtime,
    node: Node,
    path: String,
    content: Vec<u8>,
    _dir: tempfile::TempDir,
}

fn bed() -> &'static Bed {
    static BED: OnceLock<Bed> = OnceLock::new();
    BED.get_or_init(|| {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let content = noise(SIZE as usize, 6);
        let (node, path) = runtime.block_on(async {
            let origin = Origin::start().await;
            let path = origin.blob("a", &content);
            (Node::start(dir.path(), &origin, "").await, path)
        });
        Bed { runtime, node, path, content, _dir: dir }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_answer_to_a_range_is_the_slice_and_says_so(asked in asked(), anew in any::<bool>()) {
        let bed = bed();
        bed.runtime.block_on(async {
            let mut request = bed.node.get(&bed.path);
            if let Some(header) = asked.header() {
                request = request.header("Range", header);
            }
            if anew {
                // Half of the answers come over the registry again, half from the cache.
                request = request.header("X-Shoal-No-Peer", "1");
            }
            let (status, headers, body) = tell(request).await;
            let told = |name: &str| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
            match (asked.of(&bed.content), &asked) {
                (Some((_, slice)), Asked::Nothing) => {
                    assert_eq!(status, 200);
                    assert!(body == slice);
                }
                (Some((start, slice)), _) => {
                    assert_eq!(status, 206);
                    assert!(body == slice);
                    let range = format!("bytes {start}-{}/{SIZE}", start + slice.len() - 1);
                    assert_eq!(told("content-range"), Some(range));
                }
                (None, _) => {
                    assert_eq!(status, 416);
                    assert_eq!(told("content-range"), Some(format!("bytes */{SIZE}")));
                }
            }
            assert_eq!(told("content-length"), Some(body.len().to_string()));
        });
    }
}
