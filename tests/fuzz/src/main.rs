//! libFuzzer on one of the parsers of `nydus_tests::parsers`: the one that `PARSER` names.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use nydus_tests::parsers::{self, Parser};

static PARSER: LazyLock<Parser> = LazyLock::new(|| {
    let name = std::env::var("PARSER").unwrap_or_default();
    parsers::named(&name).unwrap_or_else(|| panic!("PARSER is {name:?}; there are {:?}", parsers::ALL))
});

fuzz_target!(|bytes: &[u8]| PARSER(bytes));
