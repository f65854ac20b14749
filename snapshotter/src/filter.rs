//! containerd's filters, as List gets them.
//!
//! `kind==active,labels."a/b"==c` is one filter: its parts must all hold. Several filters are alternatives; none means
//! everything. containerd finds the layers it was told "already exist" by such a filter, so this must be right. A part is a
//! field alone (present), or `==`, `!=` with a value, bare or quoted as in Go.

use crate::labels::Labels;

/// What a filter looks at.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// `active`, `view` or `committed`.
    pub kind: &'a str,
    /// Key or name.
    pub name: &'a str,
    /// Name of the parent, or empty.
    pub parent: &'a str,
    /// Labels.
    pub labels: &'a Labels,
}

/// Why a filter cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("filter {filter:?} is not valid: {why}")]
pub struct FilterError {
    filter: String,
    why: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Test {
    Present,
    Equal(String),
    Differs(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    field: Vec<String>,
    test: Test,
}

/// Alternatives, each of parts that must all hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filters(Vec<Vec<Part>>);

impl Filters {
    /// Reads the filters of a request.
    ///
    /// # Errors
    /// When one of them is malformed or uses a regular expression.
    pub fn parse<S: AsRef<str>>(filters: &[S]) -> Result<Self, FilterError> {
        let read = |filter: &S| {
            let filter = filter.as_ref();
            Reader { rest: filter }.filter().map_err(|why| FilterError { filter: filter.to_owned(), why })
        };
        Ok(Self(filters.iter().map(read).collect::<Result<_, _>>()?))
    }

    /// Whether `subject` is asked for.
    pub fn admit(&self, subject: Subject<'_>) -> bool {
        self.0.is_empty() || self.0.iter().any(|parts| parts.iter().all(|part| part.holds(subject)))
    }
}

impl Part {
    fn holds(&self, subject: Subject<'_>) -> bool {
        let value = match self.field.split_first() {
            Some((first, rest)) => match first.as_str() {
                "kind" => Some(subject.kind),
                "name" => Some(subject.name),
                "parent" => Some(subject.parent),
                "labels" => subject.labels.get(&rest.join(".")).map(String::as_str),
                _ => None,
            },
            None => None,
        };
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(want) => value == Some(want),
            // As in containerd: a field that is absent is the empty string here.
            Test::Differs(other) => value.unwrap_or_default() != other,
        }
    }
}

struct Reader<'a> {
    rest: &'a str,
}

impl Reader<'_> {
    fn filter(mut self) -> Result<Vec<Part>, &'static str> {
        let mut parts = Vec::new();
        if self.rest.is_empty() {
            return Ok(parts);
        }
        loop {
            parts.push(self.part()?);
            if self.rest.is_empty() {
                return Ok(parts);
            }
            if !self.take(",") {
                return Err("a comma must follow a condition");
            }
        }
    }

    fn part(&mut self) -> Result<Part, &'static str> {
        let mut field = vec![self.name()?];
        while self.take(".") {
            field.push(self.name()?);
        }
        let test = if self.take("==") {
            Test::Equal(self.value()?)
        } else if self.take("!=") {
            Test::Differs(self.value()?)
        } else if self.rest.starts_with("~=") {
            return Err("regular expressions are not supported");
        } else {
            Test::Present
        };
        Ok(Part { field, test })
    }

    fn take(&mut self, token: &str) -> bool {
        let Some(rest) = self.rest.strip_prefix(token) else { return false };
        self.rest = rest;
        true
    }

    fn name(&mut self) -> Result<String, &'static str> {
        if self.rest.starts_with(['"', '`']) {
            return self.quoted();
        }
        let end =
            self.rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '-')).unwrap_or(self.rest.len());
        if end == 0 {
            return Err("a field's name is missing");
        }
        let (name, rest) = self.rest.split_at(end);
        self.rest = rest;
        Ok(name.to_owned())
    }

    fn value(&mut self) -> Result<String, &'static str> {
        if self.rest.starts_with(['"', '`']) {
            return self.quoted();
        }
        let end = self.rest.find(|c: char| c == ',' || c.is_whitespace()).unwrap_or(self.rest.len());
        if end == 0 {
            return Err("a value is missing");
        }
        let (value, rest) = self.rest.split_at(end);
        self.rest = rest;
        Ok(value.to_owned())
    }

    /// A string as Go's `%q` writes it.
    fn quoted(&mut self) -> Result<String, &'static str> {
        let mut text = Vec::new();
        let mut chars = self.rest.chars();
        let quote = chars.next();
        loop {
            match chars.next() {
                None => return Err("a quote is not closed"),
                c if c == quote => break,
                Some('\\') if quote == Some('"') => escape(&mut chars, &mut text).ok_or("an escape is not valid")?,
                Some(c) => text.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        self.rest = chars.as_str();
        String::from_utf8(text).map_err(|_| "an escape does not give UTF-8")
    }
}

fn escape(chars: &mut std::str::Chars<'_>, text: &mut Vec<u8>) -> Option<()> {
    let byte = match chars.next()? {
        c @ ('\\' | '"' | '\'') => c as u8,
        'a' => 7,
        'b' => 8,
        'f' => 12,
        'n' => b'\n',
        'r' => b'\r',
        't' => b'\t',
        'v' => 11,
        'x' => u8::try_from(number(chars, 2)?).ok()?,
        long @ ('u' | 'U') => {
            let code = number(chars, if long == 'u' { 4 } else { 8 })?;
            text.extend_from_slice(char::from_u32(code)?.encode_utf8(&mut [0; 4]).as_bytes());
            return Some(());
        }
        _ => return None,
    };
    text.push(byte);
    Some(())
}

/// Exactly `count` hexadecimal digits.
fn number(chars: &mut std::str::Chars<'_>, count: usize) -> Option<u32> {
    (0..count).try_fold(0, |value, _| Some(value << 4 | chars.next()?.to_digit(16)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admitted(filters: &[&str]) -> Result<bool, FilterError> {
        let labels: Labels = [("containerd.io/snapshot.ref", "sha256:ab"), ("odd\"key", "x y"), ("a.b", "dotted")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into();
        let subject = Subject { kind: "committed", name: "k8s/1/sha256:ab", parent: "", labels: &labels };
        Ok(Filters::parse(filters)?.admit(subject))
    }

    #[test]
    fn the_filter_of_the_remote_protocol_finds_its_layer() {
        let filter = r#"labels."containerd.io/snapshot.ref"==sha256:ab,parent=="""#;
        assert_eq!(admitted(&[filter]), Ok(true));
        assert_eq!(admitted(&[&filter.replace("sha256:ab", "sha256:ac")]), Ok(false));
        assert_eq!(admitted(&[&filter.replace(r#"parent=="""#, r#"parent=="x""#)]), Ok(false));
    }

    #[test]
    fn conditions_mean_what_containerd_means() {
        let table: &[(&[&str], bool)] = &[
            (&[], true),
            (&[""], true),
            (&["kind==committed"], true),
            (&["kind==active"], false),
            (&["kind==active", "kind==committed"], true),
            (&["kind!=active,name==k8s/1/sha256:ab"], true),
            (&["name"], true),
            (&["nothing"], false),
            (&["nothing!=x"], true),
            (&["labels.missing"], false),
            (&["labels.missing==x"], false),
            (&[r#"labels."odd\"key"=="x y""#], true),
            (&[r#"labels."odd\x22key"=="x\u0020y""#], true),
            (&["labels.`odd\"key`==`x y`"], true),
            (&["labels.a.b==dotted"], true),
            (&["labels"], false),
        ];
        for (filters, want) in table {
            assert_eq!(admitted(filters), Ok(*want), "{filters:?}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_an_error() {
        for filter in
            ["==x", "kind==", "kind==a b", r#"name=="x"#, r#"name=="\q""#, "name~=x", "kind=active", ",", "kind==a,"]
        {
            admitted(&[filter]).expect_err(filter);
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(filter in ".{0,60}") {
            let _ = Filters::parse(&[filter]);
        }
    }
}
