//! Repeated measurements of one thing.

use std::fmt;

/// Values of one figure, one per round.
#[derive(Debug, Clone, Default)]
pub(crate) struct Series(Vec<f64>);

impl Series {
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Returns the middle value; 0 without any.
    pub(crate) fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        match sorted.len() {
            0 => 0.0,
            n if n % 2 == 1 => sorted[n / 2],
            n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
        }
    }

    /// Returns the value below which this part of all values lies; 0 without any.
    pub(crate) fn part(&self, part: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let at = (sorted.len() as f64 * part) as usize;
        sorted.get(at.min(sorted.len().saturating_sub(1))).copied().unwrap_or(0.0)
    }

    /// Returns how many times `other`'s median this one's is.
    pub(crate) fn ratio(&self, other: &Self) -> f64 {
        self.median() / other.median()
    }
}

/// The median, and from where to where the values went.
impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let least = self.0.iter().copied().fold(f64::INFINITY, f64::min);
        let most = self.0.iter().copied().fold(0.0, f64::max);
        f.pad(&format!("{:.2} ({least:.2}-{most:.2})", self.median()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_value_or_the_mean_of_the_two() {
        let of = |values: &[f64]| Series(values.to_vec());
        assert_eq!(of(&[9.0, 1.0, 2.0]).median(), 2.0);
        assert_eq!(of(&[4.0, 1.0, 2.0, 9.0]).median(), 3.0);
        assert_eq!(of(&[]).median(), 0.0);
        assert_eq!([of(&[1.0, 3.0, 2.0]).part(0.99), of(&[]).part(0.5)], [3.0, 0.0]);
        assert_eq!(of(&[1.0]).ratio(&of(&[4.0])), 0.25);
        assert_eq!(of(&[3.0, 1.0, 2.0]).to_string(), "2.00 (1.00-3.00)");
    }
}
