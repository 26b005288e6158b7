# SPDX-License-Identifier: Apache-2.0
# Compiles SOURCE to CUBIN for sm_ARCH, writes ptxas' report to CUBIN.txt, and fails at a warning, or if a kernel spills
# registers.
# Run by the target cubin_check: cmake -DNVCC= -DARCH= -DSOURCE= -DCUBIN= -DFLAGS= -P cubin_check.cmake
cmake_path(GET CUBIN PARENT_PATH directory)
file(MAKE_DIRECTORY ${directory})
execute_process(
  COMMAND ${NVCC} ${FLAGS} -Werror all-warnings -cubin -arch=sm_${ARCH} -Xptxas -v -MD -MT ${CUBIN}.txt -MF
          ${CUBIN}.d -o ${CUBIN} ${SOURCE}
  RESULT_VARIABLE failed ERROR_VARIABLE report)
if(failed)
  message(FATAL_ERROR "cubin_check: ${SOURCE} does not compile for sm_${ARCH}\n${report}")
endif()
if(report MATCHES "[1-9][0-9]* bytes spill")
  message(FATAL_ERROR "cubin_check: a kernel of ${SOURCE} spills registers on sm_${ARCH}\n${report}")
endif()
file(WRITE ${CUBIN}.txt "${report}")
