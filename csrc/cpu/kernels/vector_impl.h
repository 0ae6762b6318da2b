// The vector type that the explicitly vectorised loops use.

namespace dml::cpu::DML_ISA {

// As wide as a register of the instruction set.
template <typename T>
using Vector __attribute__((vector_size(DML_VECTOR_BYTES), aligned(sizeof(T)), may_alias)) = T;

}  // namespace dml::cpu::DML_ISA
