//! The records of a pax extension header: `LENGTH KEY=VALUE\n`, where the length counts the whole record.
//!
//! A record ends where its length says, never at a newline: values may hold any byte.

use std::collections::BTreeMap;

use super::sparse;

/// What the records of one extension header say about the entry that follows.
#[derive(Debug, Default)]
pub(super) struct Records {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<i64>,
    pub(super) gid: Option<i64>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The real name of a sparse file.
    pub(super) sparse_name: Option<Vec<u8>>,
    /// The real size of a sparse file.
    pub(super) sparse_size: Option<u64>,
    sparse_version: (Option<Vec<u8>>, Option<Vec<u8>>),
    /// `offset,length,…` of format 0.1, or the records of 0.0 in the order of the header.
    sparse_numbers: Option<Vec<u64>>,
}

impl Records {
    pub(super) fn parse(mut body: &[u8]) -> Result<Self, String> {
        let mut records = Self::default();
        while !body.is_empty() {
            // Some writers fill the rest of the block inside the header's size.
            if body.iter().all(|&byte| byte == 0) {
                break;
            }
            let blank = body.iter().position(|&byte| byte == b' ').ok_or("a pax record without a length")?;
            let len = decimal(&body[..blank]).and_then(|len| usize::try_from(len).ok());
            let len =
                len.filter(|&len| len > blank + 1 && len <= body.len()).ok_or("a pax record of impossible length")?;
            let (record, rest) = body.split_at(len);
            let record =
                record[blank + 1..].strip_suffix(b"\n").ok_or("a pax record that does not end in a newline")?;
            let equals = record.iter().position(|&byte| byte == b'=').ok_or("a pax record without `=`")?;
            records.take(&record[..equals], &record[equals + 1..])?;
            body = rest;
        }
        Ok(records)
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), String> {
        if key.is_empty() || key.contains(&0) {
            return Err("a pax record with an unusable key".to_owned());
        }
        let bad = || format!("pax record `{}` has the value `{}`", key.escape_ascii(), value.escape_ascii());
        let whole = |value: &[u8]| decimal(value).ok_or_else(bad);
        let name = |value: &[u8]| if value.contains(&0) { Err(bad()) } else { Ok(value.to_vec()) };
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.insert(name.to_vec(), value.to_vec());
            return Ok(());
        }
        match key {
            b"GNU.sparse.offset" => self.push_sparse(whole(value)?, 0)?,
            b"GNU.sparse.numbytes" => self.push_sparse(whole(value)?, 1)?,
            // An empty value means that the header's own field counts.
            _ if value.is_empty() => {}
            b"path" => self.path = Some(name(value)?),
            b"linkpath" => self.link = Some(name(value)?),
            b"size" => self.size = Some(whole(value)?),
            b"uid" => self.uid = Some(signed(value).ok_or_else(bad)?),
            b"gid" => self.gid = Some(signed(value).ok_or_else(bad)?),
            b"mtime" => self.mtime = Some(time(value).ok_or_else(bad)?),
            b"GNU.sparse.major" => self.sparse_version.0 = Some(value.to_vec()),
            b"GNU.sparse.minor" => self.sparse_version.1 = Some(value.to_vec()),
            b"GNU.sparse.name" => self.sparse_name = Some(name(value)?),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse_size = Some(whole(value)?),
            b"GNU.sparse.map" => {
                let numbers: Option<Vec<u64>> = value.split(|&byte| byte == b',').map(decimal).collect();
                self.sparse_numbers = Some(numbers.ok_or_else(bad)?);
            }
            _ => {}
        }
        Ok(())
    }

    fn push_sparse(&mut self, number: u64, parity: usize) -> Result<(), String> {
        let numbers = self.sparse_numbers.get_or_insert_default();
        if numbers.len() % 2 != parity {
            return Err("the records of a sparse map are out of order".to_owned());
        }
        numbers.push(number);
        Ok(())
    }

    /// Returns whether the sparse map lies before the data.
    pub(super) fn is_sparse_1_0(&self) -> bool {
        self.sparse_version.0.as_deref() == Some(b"1") && self.sparse_version.1.as_deref() == Some(b"0")
    }

    /// Returns the sparse map that the records themselves hold.
    pub(super) fn sparse_map(&self) -> Result<Option<sparse::Map>, String> {
        let Some(numbers) = &self.sparse_numbers else { return Ok(None) };
        let size = self.sparse_size.ok_or("a sparse file without its real size")?;
        let mut map = sparse::Map::new(size);
        if !numbers.len().is_multiple_of(2) {
            return Err("a sparse map with an odd count of numbers".to_owned());
        }
        for pair in numbers.chunks_exact(2) {
            map.push(pair[0], pair[1])?;
        }
        Ok(Some(map))
    }
}

/// Parses a whole number as Go does, which lets a plus sign pass.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    let text = text.strip_prefix(b"+").unwrap_or(text);
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn signed(text: &[u8]) -> Option<i64> {
    match text.strip_prefix(b"-") {
        Some([b'+', ..]) => None,
        Some(digits) => 0_i64.checked_sub_unsigned(decimal(digits)?),
        None => i64::try_from(decimal(text)?).ok(),
    }
}

/// Parses seconds with a fraction; the fraction of a negative time counts downwards in the text and upwards in the result.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (whole, fraction) = match text.iter().position(|&byte| byte == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &b""[..]),
    };
    let seconds = signed(whole)?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let mut nanos = 0;
    for at in 0..9 {
        nanos = nanos * 10 + u32::from(fraction.get(at).map_or(0, |digit| digit - b'0'));
    }
    if text.starts_with(b"-") && nanos > 0 {
        return Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos));
    }
    Some((seconds, nanos))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_may_hold_newlines_and_equal_signs() {
        let value = b"a\n9 path=b\n\0=";
        let mut record = b" SCHILY.xattr.user.x=".to_vec();
        record.extend_from_slice(value);
        record.push(b'\n');
        let len = record.len() + 2;
        let body = [len.to_string().into_bytes(), record].concat();
        let records = Records::parse(&body).unwrap();
        assert_eq!(records.xattrs[&b"user.x"[..]], value);
        assert_eq!(records.path, None);
    }

    #[test]
    fn times_before_the_epoch_count_nanoseconds_upwards() {
        assert_eq!(time(b"-1.5"), Some((-2, 500_000_000)));
        assert_eq!(time(b"-0.25"), Some((-1, 750_000_000)));
        assert_eq!(time(b"12.0000000019"), Some((12, 1)));
        assert_eq!(time(b"12.x"), None);
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        for body in [&b"3 \n"[..], b"99 a=b\n", b"x a=b\n", b"6 a=bc", b"6 abc\n", b"5 =b\n"] {
            assert!(Records::parse(body).is_err(), "{}", body.escape_ascii());
        }
    }
}
